"""One decode step: every row one token, each leaving the stack where its policy says.

Shape suffixes: B rows of the step, N rows still active, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import BoolArray
from offramp.controller.policy import ExitPolicy
from offramp.worker.fill import KVProjector
from offramp.worker.kv import SlotKV
from offramp.worker.probes import Probe, ProbeBench
from offramp.worker.sequence import Sequence
from offramp.worker.stack import LayerStack, Rotary


@dataclass(frozen=True, slots=True)
class StepResult:
    """Logits [B, V] at each row's exit, and the layers executed for each row."""

    logits_BV: Tensor
    exit_layers: list[int]


class Decoder:
    """Runs the stack over rows of the cache.

    Args:
        stack: The model.
        kv: Its cache.
        fills: Whether skipped layers get projected keys and values. False breaks the cache's
            invariant; it exists as the tests' negative control.
    """

    def __init__(self, stack: LayerStack, kv: SlotKV, *, fills: bool = True) -> None:
        self.stack = stack
        self.kv = kv
        self.bench = ProbeBench(stack)
        self.projector = KVProjector(stack) if fills else None

    @torch.inference_mode()
    def prefill(self, prompt: Rows[int], slot: int) -> Tensor:
        """Run one prompt at full depth into a slot; logits [V] of its last position."""
        tokens_BT = torch.tensor([prompt], device=self.stack.device)
        positions_BT = torch.arange(len(prompt), device=self.stack.device)[None]
        x = self.stack.embed(tokens_BT)
        rotary = self.stack.rotary(x, positions_BT)
        self.kv.open_window([slot], [0], tokens=len(prompt))
        for index in range(self.stack.layers):
            x = self.stack.run_layer(index, x, rotary, None, self.kv)
        return self.stack.logits(x[:, -1])[0]

    @torch.inference_mode()
    def step(self, rows: Rows[Sequence]) -> StepResult:
        """Feed each row its next token; leave, per row, where its policy says."""
        batch = _Batch(self, rows)
        for index in range(self.stack.layers):
            batch.run_layer(index)
            if not batch.is_active:
                break
        return batch.finish()


class _Batch:
    """The rows of one step: those still active, and the exit states of those that left."""

    def __init__(self, decoder: Decoder, rows: Rows[Sequence]) -> None:
        stack = decoder.stack
        self.decoder = decoder
        self.rows = rows
        self.slots = [row.slot for row in rows]
        self.positions = [row.position for row in rows]
        self.active = np.arange(len(rows))
        tokens_BT = torch.tensor([[row.next_input] for row in rows], device=stack.device)
        positions_BT = torch.tensor(self.positions, device=stack.device)[:, None]
        self.x_N1D = stack.embed(tokens_BT)
        self.rotary = stack.rotary(self.x_N1D, positions_BT)
        self.mask = _mask(self.positions, stack.device)
        self.groups = _groups(decoder.bench, rows, self.x_N1D[:, 0], self.positions)
        self.states_BD = torch.empty_like(self.x_N1D[:, 0])
        self.known_logits: dict[int, Tensor] = {}
        self.exit_layers = [stack.layers] * len(rows)
        decoder.kv.open_window(self.slots, self.positions)

    @property
    def is_active(self) -> bool:
        return len(self.active) > 0

    def run_layer(self, index: int) -> None:
        self.x_N1D = self.decoder.stack.run_layer(
            index, self.x_N1D, self.rotary, self.mask, self.decoder.kv
        )
        executed = index + 1
        if executed == self.decoder.stack.layers:
            return
        leaving_N = self._ask(executed)
        if leaving_N is not None and leaving_N.any():
            self._let_go(executed, leaving_N)

    def finish(self) -> StepResult:
        if self.is_active:
            self.states_BD[torch.from_numpy(self.active)] = self.x_N1D[:, 0]
        return StepResult(self._logits(), self.exit_layers)

    def _logits(self) -> Tensor:
        """One head per row: a row whose last probe ran the whole head has had it."""
        known = self.known_logits
        if not known:
            return self.decoder.stack.logits(self.states_BD)
        missing = [row for row in range(len(self.rows)) if row not in known]
        if missing:
            rest = self.decoder.stack.logits(self.states_BD[missing])
            known.update(zip(missing, rest, strict=True))
        return torch.stack([known[row] for row in range(len(self.rows))])

    def _ask(self, executed: int) -> BoolArray | None:
        leaving_N: BoolArray | None = None
        for group in self.groups:
            if executed not in group.policy.exits or not len(group.rows):
                continue
            if leaving_N is None:
                leaving_N = np.zeros(len(self.active), np.bool_)
            where_N = np.searchsorted(self.active, group.rows)
            x_ND = self.x_N1D[:, 0]
            if len(where_N) < len(self.active):
                x_ND = x_ND[torch.from_numpy(where_N)]
            leaving_N[where_N] = group.ask(executed, x_ND, self.known_logits)
        return leaving_N

    def _let_go(self, executed: int, leaving_N: BoolArray) -> None:
        left = self.active[leaving_N]
        leaving = torch.from_numpy(leaving_N)
        exit_ND = self.x_N1D[leaving, 0]
        self.states_BD[torch.from_numpy(left)] = exit_ND
        for row in left:
            self.exit_layers[row] = executed
        self._fill(executed, left, exit_ND, leaving)
        self._keep(~leaving_N)

    def _fill(self, executed: int, left: np.ndarray, exit_ND: Tensor, leaving: Tensor) -> None:
        projector = self.decoder.projector
        if projector is None:
            return
        rotary: Rotary = (self.rotary[0][leaving], self.rotary[1][leaving])
        keys, values = projector.project(exit_ND, executed, rotary)
        slots = [self.slots[row] for row in left]
        positions = [self.positions[row] for row in left]
        self.decoder.kv.fill(executed, slots, positions, keys, values)

    def _keep(self, stay_N: BoolArray) -> None:
        self.active = self.active[stay_N]
        if not self.is_active:
            return
        stay = torch.from_numpy(stay_N)
        self.x_N1D = self.x_N1D[stay]
        self.rotary = (self.rotary[0][stay], self.rotary[1][stay])
        positions = [self.positions[row] for row in self.active]
        self.mask = _mask(positions, self.decoder.stack.device)
        self.decoder.kv.open_window([self.slots[row] for row in self.active], positions)


class _Group:
    """The step's rows that run under one policy."""

    def __init__(self, policy: ExitPolicy, rows: np.ndarray, probe: Probe) -> None:
        self.policy = policy
        self.rows = rows
        self.probe = probe

    def ask(self, executed: int, x_ND: Tensor, known_logits: dict[int, Tensor]) -> BoolArray:
        """Which of the group's rows leave; they are then forgotten.

        Logits that the probe computed for them anyway are left in ``known_logits``, by row.
        """
        leave_N = self.policy.leave(self.probe.features(executed, x_ND)).copy()
        if leave_N.any():
            logits_NV = self.probe.logits()
            if logits_NV is not None:
                left = np.flatnonzero(leave_N)
                known_logits.update((int(self.rows[i]), logits_NV[i]) for i in left)
            self.probe.keep(~leave_N)
            self.rows = self.rows[~leave_N]
        return leave_N


def _groups(
    bench: ProbeBench, rows: Rows[Sequence], x_BD: Tensor, positions: list[int]
) -> list[_Group]:
    by_policy: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row.request.snapshot.policy.exits:
            by_policy.setdefault(id(row.request.snapshot.policy), []).append(index)
    groups = []
    for indices in by_policy.values():
        policy = rows[indices[0]].request.snapshot.policy
        ngrams = [rows[index].ngrams for index in indices]
        where = np.asarray(indices)
        x_ND = x_BD if len(indices) == len(rows) else x_BD[torch.from_numpy(where)]
        probe = bench.probe(policy, ngrams, x_ND, np.asarray(positions, np.int32)[where])
        groups.append(_Group(policy, where, probe))
    return groups


def _mask(positions: list[int], device: torch.device) -> Tensor | None:
    """Which entries each row may attend to, [N, 1, 1, span]; None if all rows are as long."""
    longest = max(positions)
    if all(position == longest for position in positions):
        return None
    span = torch.arange(longest + 1, device=device)
    return span <= torch.tensor(positions, device=device)[:, None, None, None]
