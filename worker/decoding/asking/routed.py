"""Rows under one routing policy: those due at an exit are asked together.

Shape suffixes: N rows, D width, F features, C columns of outlook, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import RoutingPolicy, Seen, reads_state
from offramp.worker.decoding.asking.groups import NOBODY
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.asking.outlook import Load, outlook_of
from offramp.worker.decoding.sequence import Leaving, Sequence
from offramp.worker.model.transfers import take
from offramp.worker.probes import Candidates, FusedProbe, Probe, SoftmaxProbe, part_of


@dataclass(slots=True)
class DueRows:
    """Rows of a group that have been asked at the same exits so far, and are next asked at one.

    Attributes:
        rows: The rows, in the order of the probe's.
        probe: Remembers what it saw of them.
        target: Index of the exit.
    """

    rows: list[Sequence]
    probe: Probe
    target: int

    def part(self, targets: Rows[int | None], target: int) -> DueRows:
        """Those of the rows that are sent to a target; the probe of the others is untouched."""
        if all(found == target for found in targets):
            return DueRows(self.rows, self.probe, target)
        goes_N = np.array([found == target for found in targets], np.bool_)
        rows = [row for row, goes in zip(self.rows, goes_N, strict=True) if goes]
        return DueRows(rows, part_of(self.probe, goes_N), target)


class RoutedGroup:
    """Rows whose policy says at which exit each is asked next: those due at an exit, together.

    Rows part ways, and with them what their probe remembers.

    Args:
        policy: The routing policy that the rows run under.
        begun: The rows.
        probe: Computes the policy's features.
        targets: Index of the exit each is asked at first.
        load: Rows running and waiting in the engine, as the outlook shows them.
        limits: Number of layers, and of tokens of a row that may be pending.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        begun: list[Sequence],
        probe: Probe,
        targets: Rows[int],
        load: Load,
        limits: tuple[int, int],
    ) -> None:
        self.probe = probe
        self._policy = policy
        self._reads_state = reads_state(policy)
        self._load = load
        self._limits = limits
        together = DueRows(begun, probe, 0)
        self._due = [together.part(targets, target) for target in sorted(set(targets))]

    @property
    def rows(self) -> list[Sequence]:
        """The rows that are still asked."""
        return [row for due in self._due for row in due.rows]

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits at which some row may yet be asked: none before the first target."""
        return self._policy.exits[min((due.target for due in self._due), default=0) :]

    def target_of(self, row: Sequence) -> int | None:
        """Index of the exit a row is asked at next; None if it is not asked any more."""
        return next((due.target for due in self._due if row in due.rows), None)

    def exits_of(self, row: Sequence) -> tuple[int, ...]:
        """The exits at which a row may yet be asked: never one before its target."""
        target = self.target_of(row)
        return () if target is None else self._policy.exits[target:]

    def asked_at(self, executed: int) -> list[Sequence]:
        """The rows that were sent to this exit."""
        exits = self._policy.exits
        return [row for due in self._due if exits[due.target] == executed for row in due.rows]

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Leaving:
        """Probe the rows; their policy lets each leave here, or sends it to a deeper exit."""
        if len(self._due) == 1 and len(self._due[0].rows) == 1:
            return self._ask_one(guard, self._due[0], int(executed), x_N1D[:, 0])
        exits = self._policy.exits
        asked = [due for due in self._due if exits[due.target] == executed]
        self._due = [due for due in self._due if due not in asked]
        features: list[FloatArray] = []
        rows: list[Sequence] = []
        states_ND = x_N1D[:, 0]
        for due in asked:
            due_ND = states_ND[len(rows) : len(rows) + len(due.rows)]
            features.append(due.probe.features(int(executed), due_ND))
            rows += due.rows
        features_NF = features[0] if len(asked) == 1 else np.concatenate(features)
        here, outlook_NC = asked[0].target, outlook_of(rows, self._load, *self._limits)
        seen = _seen(rows, states_ND) if self._reads_state else None
        targets = guard.route(self._policy, here, features_NF, outlook_NC, seen)
        for row, target, features_F in zip(rows, targets, features_NF, strict=True):
            if target is None:
                row.fail_policy()
            elif target == here and row.learns:
                row.open[-1].left_at = (here, features_F.copy())
        of_each = iter(targets)
        left = [self._send_on(due, [next(of_each) for _ in due.rows]) for due in asked]
        return left[0] if len(left) == 1 else _joined(left)

    def _ask_one(self, guard: PolicyGuard, due: DueRows, executed: int, x_1D: Tensor) -> Leaving:
        """Ask about a row alone, where none has to be sorted; in one call if that can be."""
        [row], here, probe = due.rows, due.target, due.probe
        outlook_1C = outlook_of(due.rows, self._load, *self._limits)
        if isinstance(probe, FusedProbe) and probe.router is not None and not row.learns:
            ask = partial(probe.route, executed, x_1D, here, outlook_1C)
            target = guard.ask_one(self._policy, ask)
        else:
            features_1F = probe.features(executed, x_1D)
            seen = _seen(due.rows, x_1D) if self._reads_state else None
            [target] = guard.route(self._policy, here, features_1F, outlook_1C, seen)
            if target == here and row.learns:
                row.open[-1].left_at = (here, features_1F[0].copy())
        self._due = []
        if target is None:
            row.fail_policy()
        elif target == here:
            return Leaving(due.rows, probe.logits(), _drafted(due))
        elif target < len(self._policy.exits):
            self._due = [DueRows(due.rows, probe, target)]
        return NOBODY

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget rows that were cancelled while they waited at a hold."""
        left = []
        for due in self._due:
            there = [due.target if row in rows else None for row in due.rows]
            left.append(due.part(there, due.target))
        self._due = [due for due in left if due.rows]

    def _send_on(self, due: DueRows, targets: list[int | None]) -> Leaving:
        """Divide rows by where they go; who runs to the end is not asked again on the way."""
        here, end = due.target, len(self._policy.exits)
        deeper = sorted({t for t in targets if t is not None and here < t < end})
        self._due += [due.part(targets, target) for target in deeper]
        if here not in targets:
            return NOBODY
        left, logits_NV = due.part(targets, here), due.probe.logits()
        if logits_NV is not None and len(left.rows) < len(targets):
            logits_NV = take(logits_NV, [n for n, t in enumerate(targets) if t == here])
        return Leaving(left.rows, logits_NV, _drafted(left))


def _seen(rows: list[Sequence], states_ND: Tensor) -> Seen:
    """What rows are known by; a probe has read their states and leaves them as they are."""
    read_N = np.array([row.next_input for row in rows], np.int32)
    return Seen(read_N, states_ND.float().cpu().numpy())


def _drafted(left: DueRows) -> list[int | None]:
    """Give the draft of each row whose probe has found it: without the LM head, or by its draw."""
    known = [row.headless for row in left.rows]
    if isinstance(left.probe, SoftmaxProbe) and left.probe.scores:
        known = [each is not None for each in left.probe.scores]
    if not any(known):
        return [None] * len(known)
    best_N = cast(Candidates, left.probe).best_N().tolist()
    return [best if knows else None for knows, best in zip(known, best_N, strict=True)]


def _joined(left: list[Leaving]) -> Leaving:
    """Put rows together that left by different ways."""
    left = [each for each in left if each.rows]
    logits = [each.logits_NV for each in left if each.logits_NV is not None]
    return Leaving(
        [row for each in left for row in each.rows],
        torch.cat(logits) if logits else None,
        [token for each in left for token in each.tokens],
    )
