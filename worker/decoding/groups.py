"""Rows that are asked together because they run under one policy, and rows that are asked alone.

Shape suffixes: N rows, D width, V vocabulary, F features.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple, Protocol, cast

import numpy as np
from torch import Tensor

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, RoutingPolicy
from offramp.worker.decoding.guard import PolicyGuard
from offramp.worker.decoding.outlook import Load, outlook_of
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.probes import Candidates, FusedProbe, Probe


class Left(NamedTuple):
    """Rows that leave, and what is known of their tokens.

    Attributes:
        rows: Which.
        logits_NV: Their whole logits, if a probe computed them anyway.
        token: Draft of the only row, if it takes no head.
    """

    rows: list[Sequence]
    logits_NV: Tensor | None = None
    token: int | None = None


NOBODY = Left([])


class Asked(Protocol):
    """Rows on their way through the stack that are asked, at some exits, whether they leave."""

    rows: list[Sequence]

    @property
    def probe(self) -> Probe:
        """What reads their states."""
        ...

    @property
    def exits(self) -> tuple[int, ...]:
        """Where any of them may be asked, as long as the wave lasts."""
        ...

    def asks_at(self, executed: int) -> bool:
        """Whether any of them is asked after so many layers."""
        ...

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Left:
        """Which rows leave; they are then forgotten.

        If the policy fails none leaves, and none is asked again until its request ends.

        Args:
            guard: Survives the policy's failures.
            executed: Layers executed.
            x_N1D: The rows' hidden states.
        """
        ...

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget rows that were cancelled while they waited."""
        ...


class Group:
    """Rows that an exit policy is asked about together, and what their probe remembers of them.

    Args:
        policy: Theirs.
        rows: In the order of the probe's rows.
        probe: Computes the policy's features.
    """

    def __init__(self, policy: ExitPolicy, rows: list[Sequence], probe: Probe) -> None:
        self.policy = policy
        self.rows = rows
        self.probe = probe

    @property
    def exits(self) -> tuple[int, ...]:
        """Those of the policy."""
        return self.policy.exits

    def asks_at(self, executed: int) -> bool:
        """At every exit of the policy."""
        return executed in self.policy.exits and bool(self.rows)

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Left:
        """As ``Asked`` says."""
        features_NF = self.probe.features(executed, x_N1D[:, 0])
        leave_N = guard.decide(self.policy, features_NF)
        if leave_N is None:
            for row in self.rows:
                row.policy_failed = True
            self.rows = []
            return NOBODY
        if not leave_N.any():
            return NOBODY
        if self.rows[0].learns:
            self._note(self.policy.exits.index(executed), leave_N, features_NF)
        if leave_N.all():  # as always at batch 1: nothing is left to be sorted out
            leaving, self.rows = self.rows, []
            return Left(leaving, self.probe.logits())
        leave_N = leave_N.copy()
        logits_NV = self.probe.logits()
        known_NV = None if logits_NV is None else logits_NV[np.flatnonzero(leave_N)]
        leaving = [row for row, leaves in zip(self.rows, leave_N, strict=True) if leaves]
        self._keep(~leave_N)
        return Left(leaving, known_NV)

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """As ``Asked`` says."""
        stay_N = np.asarray([row in rows for row in self.rows], np.bool_)
        if not stay_N.all():
            self._keep(stay_N)

    def _note(self, here: int, leave_N: BoolArray, features_NF: FloatArray) -> None:
        for row, leaves, features_F in zip(self.rows, leave_N, features_NF, strict=True):
            if leaves:
                row.open[-1].left_at = (here, features_F.copy())

    def _keep(self, stay_N: np.ndarray) -> None:
        self.probe.keep(stay_N)
        self.rows = [row for row, stays in zip(self.rows, stay_N, strict=True) if stays]


class FusedGroup:
    """Rows whose probe and policy are one compiled call.

    Args:
        policy: Theirs.
        rows: In the order of the probe's rows.
        probe: Computes the policy's features and decides.
    """

    def __init__(self, policy: MlpPolicy, rows: list[Sequence], probe: FusedProbe) -> None:
        self.rows = rows
        self.exits = policy.exits
        self.probe = probe
        self._policy = policy

    def asks_at(self, executed: int) -> bool:
        """At every exit of the policy."""
        return executed in self.exits and bool(self.rows)

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Left:
        """As ``Asked`` says, but that a row whose features are not finite fails alone."""
        gone = self.probe.leaving(executed, x_N1D)
        if not gone:
            return NOBODY
        rows = self.rows
        self.rows = [row for n, row in enumerate(rows) if n not in gone and -1 - n not in gone]
        failed = [rows[-1 - place] for place in gone if place < 0]
        if failed:
            guard.report(self._policy, PolicyFaultError("features or logit are not finite"))
            for row in failed:
                row.policy_failed = True
        return Left([rows[place] for place in gone if place >= 0])

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """As ``Asked`` says."""
        stay_N = np.asarray([row in rows for row in self.rows], np.bool_)
        if not stay_N.all():
            self.probe.keep(stay_N)
            self.rows = [row for row in self.rows if row in rows]


class Route:
    """One row whose policy says at which exit it is asked next.

    Alone, since rows part ways: a probe remembers what it saw of a row at its last exit.

    Args:
        policy: The row's.
        row: The row.
        probe: Computes the policy's features.
        target: Index of the exit it is asked at next.
        load: Of the engine.
        frame: Number of layers, and of tokens the row may put off.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        row: Sequence,
        probe: Probe,
        target: int,
        load: Load,
        frame: tuple[int, int],
    ) -> None:
        self.rows = [row]
        self.probe = probe
        self._policy = policy
        self._target = target
        self._load = load
        self._frame = frame

    @property
    def exits(self) -> tuple[int, ...]:
        """Those of the policy."""
        return self._policy.exits

    def asks_at(self, executed: int) -> bool:
        """At the exit it was sent to."""
        return bool(self.rows) and self._policy.exits[self._target] == executed

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Left:
        """As ``Asked`` says."""
        [row] = self.rows
        here = self._target
        features_1F = self.probe.features(executed, x_N1D[:, 0])
        outlook_1C = outlook_of(row, self._load, *self._frame)
        target = guard.route(self._policy, here, features_1F, outlook_1C)
        if target is None:
            row.policy_failed = True
        if target is None or target == len(self._policy.exits):
            self.rows = []
            return NOBODY
        self._target = target
        if target != here:
            return NOBODY
        if row.learns:
            row.open[-1].left_at = (here, features_1F[0].copy())
        self.rows = []
        if row.headless:
            return Left([row], token=int(cast(Candidates, self.probe).best_N()[0]))
        return Left([row], self.probe.logits())

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """As ``Asked`` says."""
        self.rows = [row for row in self.rows if row in rows]
