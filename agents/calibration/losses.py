"""Losses of a policy on the calibration documents: decoded on-policy, or replayed from traces.

A loss belongs to a *unit*. Tokens of one document share its style, its difficulty and, once exits
have bent it, its cache: they are not independent draws, documents are. So a unit is a document by
default, its loss the mean over its tokens, in [0, 1]. Taking tokens as units gives 0/1 losses, an
exact binomial test and a far larger n, under an assumption that is false to the degree that losses
cluster by document.

What a line of text loses is max(0, edit similarity of full depth's completion − that of the
policy's), each to the document's own line, in [0, 1], by CodeXGLUE's protocol
(``agents/evaluation/lines.py``). A line that the policy completes better is not set off against
another, so what is bounded is at least the drop of the mean edit similarity, in points.

Shape suffixes: N units, T tokens, L lines, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from offramp.agents.calibration.calibration_documents import LINES, LONGEST, CalibrationDocument
from offramp.agents.calibration.pvalues import Losses
from offramp.agents.evaluation.lines import Line, complete, edit_similarity
from offramp.agents.evaluation.statistics import Floats
from offramp.agents.placing.replay import walk
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, IntArray
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.certificate import DecodeMode, Unit
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.follow import follow
from offramp.worker.recording.recorder import record_document

DISAGREEMENT = "disagreement"
"""1 where the token differs from full depth's under the same history, else 0."""

EDIT_SIMILARITY = "edit-similarity"
LOSSES = (DISAGREEMENT, EDIT_SIMILARITY)
"""What can be bounded."""


def require_loss(loss: str, unit: str, *, replay: bool) -> None:
    """Refuse a loss that is unknown, or that cannot be measured as asked.

    Raises:
        ConfigError: it is; the field names the option.
    """
    if loss not in LOSSES:
        raise ConfigError("loss", f"{loss!r} is unknown", f"Use one of {', '.join(LOSSES)}")
    if loss == EDIT_SIMILARITY and unit != "document":
        raise ConfigError("unit", f"{loss} is not a {unit}'s", "Use document")
    if loss == EDIT_SIMILARITY and replay:
        raise ConfigError("replay", f"has no completions to take {loss} of", "Leave it out")


class LossSource(Protocol):
    """Measures a policy on the same documents each time.

    Attributes:
        loss: What is lost, as a certificate calls it; each loss lies in [0, 1].
        decode_mode: The mode that it is measured in.
        new_tokens: Tokens of each document that it is measured on, at most.
    """

    loss: str
    decode_mode: DecodeMode
    new_tokens: int

    def losses(self, policy: Policy, unit: Unit) -> Losses:
        """Losses of a policy, [N]."""
        ...

    def leaves(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Shares of the tokens of the last policy that left at each exit; () if not recorded."""
        ...


def serving_mode(engine: AdaptiveEngine) -> DecodeMode:
    """The mode of an engine whose exits can lose something.

    Raises:
        ConfigError: the engine verifies: there is no loss to bound.
    """
    mode = engine.config.kv_mode
    if mode == "verify":
        raise ConfigError(
            "kv_mode",
            "verify emits what full depth would: there is no loss to bound",
            "Use project or defer",
        )
    return mode


class TokenLosses:
    """Counts the tokens that differ from full depth's."""

    loss = DISAGREEMENT

    def losses(self, policy: Policy, unit: Unit) -> Losses:
        """Losses of each document, or of each token; [N]."""
        return by_unit(self.disagreement(policy), unit)

    def leaves(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Nothing: it is not recorded."""
        return ()

    def disagreement(self, policy: Policy) -> list[NDArray[np.bool_]]:
        """Per document, which tokens [T] differ from full depth's under the same history."""
        raise NotImplementedError


class OnPolicy(TokenLosses):
    """Decodes with the exits really taken, and the cache that they leave behind.

    Args:
        engine: Idle, in mode ``project`` or ``defer``.
        documents: Windows, each longer than ``prompt_tokens`` + 1.
        prompt_tokens: Tokens of each read at full depth first.

    Raises:
        ConfigError: the engine verifies: there is no loss to bound.
    """

    def __init__(
        self, engine: AdaptiveEngine, documents: Sequence[CalibrationDocument], prompt_tokens: int
    ) -> None:
        self.decode_mode: DecodeMode = serving_mode(engine)
        self.new_tokens = _counted(documents, prompt_tokens)
        self._engine = engine
        self._tokens = [document.tokens for document in documents]
        self._prompt_tokens = prompt_tokens
        self._depths_N = np.zeros(0, np.int64)
        self._full = self._emitted(NeverExit())

    def leaves(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Shares of the tokens of the last policy that left at each exit."""
        return tuple(float((self._depths_N == depth).mean()) for depth in exits)

    def disagreement(self, policy: Policy) -> list[NDArray[np.bool_]]:
        """Per document, which tokens [T] differ from full depth's, teacher-forced."""
        pairs = zip(self._emitted(policy), self._full, strict=True)
        return [mine_T != full_T for mine_T, full_T in pairs]

    def _emitted(self, policy: Policy) -> list[NDArray[np.int64]]:
        runs, _ = follow(self._engine, self._tokens, self._prompt_tokens, policy)
        self._depths_N = np.concatenate([run.exit_layers for run in runs])
        return [np.asarray(run.emitted, np.int64) for run in runs]


class RecordedLosses(TokenLosses):
    """Replays recorded tokens.

    Optimistic: their cache is exact, as after no exit at all. A certificate from it says "replay".

    Args:
        traces: Recorded at the exits that the family asks at.
        counted_N: Which of their tokens losses count; None: all.
    """

    decode_mode: DecodeMode = "replay"

    def __init__(self, traces: TokenTraces, counted_N: NDArray[np.bool_] | None = None) -> None:
        self._traces = traces
        self._counted_N = np.ones(len(traces), bool) if counted_N is None else counted_N
        self.new_tokens = int(np.bincount(traces.document_N[self._counted_N]).max())

    def disagreement(self, policy: Policy) -> list[NDArray[np.bool_]]:
        """Per document, which tokens [T] differ from full depth's, all after an exact cache."""
        traces = self._traces
        taken_N = walk(policy, traces).taken_N
        differs_N = traces.quality("agreement")[np.arange(len(traces)), taken_N] == 0
        return [
            differs_N[self._counted_N & (traces.document_N == index)]
            for index in range(len(traces.documents))
        ]


class Replayed(RecordedLosses):
    """Replays one full-depth pass over each document.

    Args:
        engine: Idle; records the full-depth passes.
        documents: Windows, as for ``OnPolicy``.
        prompt_tokens: Tokens of each left out of the losses, as on-policy.
        exits: Layers to probe: those that the family asks at.
        candidates_VK: The candidate table of the recorded traces.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        documents: Sequence[CalibrationDocument],
        prompt_tokens: int,
        exits: Sequence[int],
        candidates_VK: IntArray,
    ) -> None:
        stack, translators = engine.stack, engine.decoder.translators
        chunks = [
            record_document(
                stack, each.digest, each.tokens, exits, candidates_VK, translators=translators
            )
            for each in documents
        ]
        header = TraceHeader(
            model=engine.model_fingerprint,
            schema=CANDIDATES_V1.digest,
            exits=tuple(exits),
            layers=stack.layers,
            translators=translators.digest,
        )
        # As on-policy: the token after the prompt comes from full depth.
        counted_N = np.concatenate([np.arange(len(each)) >= prompt_tokens for each in chunks])
        super().__init__(TokenTraces.from_chunks(header, chunks), counted_N)


class CompletedLines:
    """Completes lines with the exits really taken, greedily, each up to its end.

    Args:
        engine: Idle, with a tokenizer, in mode ``project`` or ``defer``.
        lines: The lines of each document, one or more.

    Raises:
        ConfigError: the engine verifies: there is no loss to bound.
    """

    loss = "edit similarity lost in line completion"
    new_tokens = LINES * LONGEST

    def __init__(self, engine: AdaptiveEngine, lines: Sequence[Sequence[Line]]) -> None:
        self.decode_mode: DecodeMode = serving_mode(engine)
        self._engine = engine
        self._lines_L = [line for mine in lines for line in mine]
        ends = np.cumsum([0, *map(len, lines)])
        self._documents_N = [slice(start, end) for start, end in pairwise(ends)]
        self._full_L = self._similarities(NeverExit())

    def leaves(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Nothing: it is not recorded."""
        return ()

    def losses(self, policy: Policy, unit: Unit) -> Losses:
        """Each document's mean over its lines, [N].

        Raises:
            ConfigError: tokens are asked for as units.
        """
        if unit != "document":
            raise ConfigError("unit", f"a line's loss is not of any {unit}", "Use document")
        # Not set off: a document must not buy one bad line with another good one.
        lost_L = np.maximum(0.0, self._full_L - self._similarities(policy))
        return np.asarray([lost_L[place].mean() for place in self._documents_N])

    def _similarities(self, policy: Policy) -> Floats:
        """Edit similarity of each completion to the document's line, in [0, 1]; [L]."""
        texts = complete(self._engine, self._lines_L, policy, LONGEST)
        pairs = zip(texts, self._lines_L, strict=True)
        return np.asarray([edit_similarity(text, line.target) / 100 for text, line in pairs])


def _counted(documents: Sequence[CalibrationDocument], prompt_tokens: int) -> int:
    """Tokens of a document that losses count: all but the prompt and the last."""
    lengths = [len(each.tokens) for each in documents]
    return max(lengths, default=prompt_tokens + 1) - prompt_tokens - 1


def by_unit(differs: Sequence[NDArray[np.bool_]], unit: Unit) -> Losses:
    """Losses [N]: one mean per document, or one 0/1 loss per token."""
    if unit == "document":
        return np.asarray([differs_T.mean() for differs_T in differs], np.float64)
    return np.concatenate(list(differs)).astype(np.float64)
