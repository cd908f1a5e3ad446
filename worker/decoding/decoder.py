"""Prompts and waves over the slot cache, and one LM head for all that comes out.

Shape suffixes: M tokens of one row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.controller.features import MAX_PENDING
from offramp.controller.policies.protocols import Policy
from offramp.worker.decoding.asking.grouping import RowGrouper
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.asking.outlook import Load
from offramp.worker.decoding.draft_wave import DraftWave
from offramp.worker.decoding.full_wave import full_wave, is_full
from offramp.worker.decoding.prompting.prompt_chunk import PromptChunk
from offramp.worker.decoding.reading import ExitReader
from offramp.worker.decoding.sampler import report_each
from offramp.worker.decoding.schedule import Launch
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.decoding.wave import Wave
from offramp.worker.decoding.wave_context import (
    Arrival,
    DraftCopy,
    ExitRecords,
    Overhead,
    WaveContext,
)
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.model.filling.cache_filler import CacheFiller
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.kernels.shortlist import likeliest
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.transfers import fetch
from offramp.worker.model.translators import UNTRANSLATED
from offramp.worker.probes import ProbeFactory

REPORTED_AT_ONCE = 32
"""Prompt tokens whose logits are held together: those of a whole prompt could fill the memory."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came of a row in a wave.

    Attributes:
        row: The row that came out.
        exit_layer: Layers executed so far.
        logits_MV: Logits after each of the tokens that came out, the oldest first: one, unless
            the row verifies and came to the end; none, if the successor takes no head. In host
            memory if the row's sampler reads them.
        best_M: The most likely token after each.
        decides: Whether the last of them is to be followed by a new token.
        left: Exits and features where the tokens before the last had left, if the policy learns.
        drafted: Whether it came out at an exit.
    """

    row: Sequence
    exit_layer: int
    logits_MV: Tensor
    best_M: list[int]
    decides: bool
    left: ExitRecords = ()
    drafted: bool = False


class Decoder:
    """Runs the stack over rows of the cache.

    Args:
        stack: The model, as a stack of layers.
        kv: The cache of its keys and values.
        max_pending: Tokens of a row that may be pending (``defer``, ``verify``).
        translators: What exits are read through under a policy that names no adapters.
        fills: Whether skipped layers get projected keys and values. False breaks the cache's
            invariant; it exists as the tests' negative control.
        copy: The model's layers in fewer bytes, for rows in ``verify`` to leave early on.

    Attributes:
        overhead: What was spent beside the model.
        probes: Makes the probes that policies read.
        reader: Reads each row's exits through its adapters.
        grouper: Puts rows into the groups they are asked in.
        guard: Asks policies, and survives those that fail.
        projector: Projects exit states; None if skipped layers are not filled.
        context: What every wave works with.
    """

    def __init__(
        self,
        stack: LayerStack,
        kv: SlotKV,
        *,
        max_pending: int = MAX_PENDING,
        translators: ExitAdapters = UNTRANSLATED,
        fills: bool = True,
        copy: LayerStack | None = None,
    ) -> None:
        self.stack = stack
        self.kv = kv
        self.reader = ExitReader(stack, translators)
        self.overhead = Overhead()
        self.probes = ProbeFactory(stack)
        self.guard = PolicyGuard()
        self.grouper = RowGrouper(self.probes, self.guard, stack.layers, max_pending)
        self.projector = KVProjector(stack) if fills else None
        self.context = WaveContext(
            stack=stack,
            kv=kv,
            filler=CacheFiller(kv, self.projector),
            reader=self.reader,
            grouper=self.grouper,
            guard=self.guard,
            max_pending=max_pending,
            overhead=self.overhead,
            copy=None if copy is None else self._draft_copy(copy, max_pending),
        )
        self._no_logits = torch.empty(0, stack.vocab, device=stack.device)

    def _draft_copy(self, stack: LayerStack, max_pending: int) -> DraftCopy:
        probes = ProbeFactory(stack)
        return DraftCopy(stack, probes, RowGrouper(probes, self.guard, stack.layers, max_pending))

    def prepare(self, policy: Policy) -> None:
        """Compute now what a policy's probes would compute on their first use, from any thread."""
        copy = self.context.copy
        for probes in (self.probes, *(() if copy is None else (copy.probes,))):
            probes.prepare(policy)

    def observe(self, load: Load) -> None:
        """Say how busy the engine is."""
        copy = self.context.copy
        for grouper in (self.grouper, *(() if copy is None else (copy.grouper,))):
            grouper.load = load

    @property
    def translators(self) -> ExitAdapters:
        """What exits are read through under a policy that names no adapters."""
        return self.reader.own

    @property
    def failures(self) -> int:
        """Requests whose policy failed and that went on at full depth."""
        return self.overhead.failures

    @torch.inference_mode()
    def prefill(self, row: Sequence, tokens: int) -> tuple[Tensor, int] | None:
        """Run the next tokens of a row's prompt, at full depth or with exits, as it asks.

        Returns:
            Logits [V] after the whole prompt and the most likely token by them; None while some
            of it is left.
        """
        states_TD = PromptChunk(self.context, row, tokens).run()
        self._report_prompt(row, states_TD)
        row.prefilled = min(row.prefilled + tokens, len(row.request.prompt))
        if not row.is_prefilled:
            return None
        [best], logits_1V = self._judged(self.stack.logits(states_TD[-1:]), [row])
        return logits_1V[0], best

    def _report_prompt(self, row: Sequence, states_MD: Tensor) -> None:
        """Keep what is to be told of the prompt's tokens that follow those just read."""
        count = row.request.sampling.prompt_logprobs
        if count is None:
            return
        following = row.request.prompt[row.prefilled + 1 :]
        for start in range(0, len(states_MD), REPORTED_AT_ONCE):
            tokens = following[start : min(start + REPORTED_AT_ONCE, len(states_MD))]
            if tokens:
                logits_MV = self.stack.logits(states_MD[start : start + len(tokens)])
                row.prompt_draws += report_each(tokens, logits_MV, count)

    @torch.inference_mode()
    def launch(self, waves: Rows[tuple[Launch[Sequence], Rows[Sequence]]]) -> list[RowResult]:
        """Run launches one after the other, and one head for all; rows leave as policies say.

        Args:
            waves: Launches without common members, each with rows that catch up: those whose
                pending tokens come along.
        """
        arrivals: list[Arrival] = []
        for launch, catch_up in waves:
            if not catch_up and is_full(self.context, launch):
                arrivals += full_wave(self.context, launch.members)
                continue
            members = launch.members
            if launch.first == 0 and launch.ending != "all":
                drafted = self._draft(members)
                arrivals += drafted
                gone = {each.row for each in drafted}
                members = tuple(row for row in members if row not in gone)
            if members or launch.first > 0:
                wave = Wave(self.context, members, launch.first, catch_up, launch.ending)
                arrivals += wave.run(launch.last)
        return self._results(arrivals)

    def _draft(self, rows: Rows[Sequence]) -> list[Arrival]:
        """Let rows draft on the quantised copy, if there is one and their policies leave there."""
        copy = self.context.copy
        if copy is None:
            return []
        drafting = [row for row in rows if row.drafts_on_copy and not row.policy_failed]
        return DraftWave(self.context, copy, drafting).run() if drafting else []

    def _results(self, arrivals: list[Arrival]) -> list[RowResult]:
        """Run one LM head for all tokens whose logits are asked for and not known."""
        # Rows that catch up ask for nothing: their cache entries were what was missing.
        arrivals = [each for each in arrivals if each.decides or each.row.drafts or each.left]
        if not arrivals:
            return []
        judged = [each for each in arrivals if each.token is None]
        best, logits = self._judged(self._logits(judged), [each.row for each in judged])
        results, start = [], 0
        for each in arrivals:
            end = start + _tokens_to_judge(each) * (each.token is None)
            best_M = best[start:end] if each.token is None else [each.token]
            results.append(
                RowResult(
                    each.row,
                    each.exit_layer,
                    logits[start:end],
                    best_M,
                    each.decides,
                    each.left,
                    each.drafted,
                )
            )
            start = end
        return results

    def _judged(self, logits_NV: Tensor, rows: Rows[Sequence]) -> tuple[list[int], Tensor]:
        """Say which tokens are most likely; bring logits to the host if a row's sampler reads them.

        All come in one transfer: on a GPU each takes a wait for all that was launched.
        """
        if not rows:
            return [], logits_NV
        if logits_NV.device.type == "cpu":
            return likeliest(logits_NV), logits_NV  # torch takes many times as long
        best_N = logits_NV.argmax(-1)
        if all(row.sampler.is_plain_greedy for row in rows):
            return fetch(best_N)[0].tolist(), logits_NV
        best_N, logits_NV = fetch(best_N, logits_NV)
        return best_N.tolist(), logits_NV

    def _logits(self, arrivals: list[Arrival]) -> Tensor:
        """Compute the logits after all tokens that are judged, in order, [Σ M, V]."""
        if not arrivals:
            return self._no_logits
        unknown = [each for each in arrivals if each.logits_V is None]
        if not unknown:
            return torch.stack([each.logits_V for each in arrivals if each.logits_V is not None])
        if len(unknown) == len(arrivals) and len({each.on_copy for each in unknown}) == 1:
            return self._head(unknown)
        computed = {}
        for on_copy in (False, True):
            some = [each for each in unknown if each.on_copy is on_copy]
            if some:
                counts = [_tokens_to_judge(each) for each in some]
                parts = torch.split(self._head(some), counts)
                computed.update({id(each): part for each, part in zip(some, parts, strict=True)})
        return torch.cat(
            [computed[id(a)] if a.logits_V is None else a.logits_V[None] for a in arrivals]
        )

    def _head(self, arrivals: list[Arrival]) -> Tensor:
        """Run the head that reads them over all tokens that are judged."""
        parts = [each.states_MD[-_tokens_to_judge(each) :] for each in arrivals]
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        copy = self.context.copy
        stack = copy.stack if copy is not None and arrivals[0].on_copy else self.stack
        return stack.logits(states)


def _tokens_to_judge(arrival: Arrival) -> int:
    """Count the tokens that full depth is asked about: all, if any is to be confirmed or learnt."""
    return len(arrival.states_MD) if arrival.row.drafts or arrival.left else 1
