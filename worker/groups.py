"""Rows that are asked together because they run under one policy, and rows that are routed alone.

Shape suffixes: N rows, D width, V vocabulary, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import Protocol, cast

import numpy as np
from torch import Tensor

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import ExitPolicy, RoutingPolicy
from offramp.worker.guard import PolicyGuard
from offramp.worker.outlook import Load, outlook_of
from offramp.worker.probes import CandidateProbe, Probe, ProbeBench
from offramp.worker.sequence import Sequence

Left = tuple[list[Sequence], Tensor | None]
"""Rows that leave, and their whole logits [N, V] if a probe computed them anyway."""


class Asked(Protocol):
    """Rows on their way through the stack that are asked, at some exits, whether they leave."""

    rows: list[Sequence]

    def asks_at(self, executed: int) -> bool:
        """Whether any of them is asked after so many layers."""
        ...

    def ask(self, guard: PolicyGuard, executed: int, x_ND: Tensor) -> Left:
        """Which rows leave; they are then forgotten.

        If the policy fails none leaves, and none is asked again until its request ends.

        Args:
            guard: Survives the policy's failures.
            executed: Layers executed.
            x_ND: The rows' hidden states.
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
        is_plain = type(policy) is MlpPolicy and len(rows) == 1
        self._is_compiled = is_plain and type(probe) is CandidateProbe and probe.is_compiled

    def asks_at(self, executed: int) -> bool:
        """At every exit of the policy."""
        return executed in self.policy.exits and bool(self.rows)

    def ask(self, guard: PolicyGuard, executed: int, x_ND: Tensor) -> Left:
        """As ``Asked`` says."""
        if self._is_compiled:
            return self._ask_one(guard, executed, x_ND)
        features_NF = self.probe.features(executed, x_ND)
        leave_N = guard.decide(self.policy, features_NF)
        if leave_N is None:
            for row in self.rows:
                row.policy_failed = True
            self.rows = []
            return [], None
        if not leave_N.any():
            return [], None
        if self.rows[0].learns:
            self._note(self.policy.exits.index(executed), leave_N, features_NF)
        if leave_N.all():  # as always at batch 1: nothing is left to be sorted out
            leaving, self.rows = self.rows, []
            return leaving, self.probe.logits()
        leave_N = leave_N.copy()
        logits_NV = self.probe.logits()
        known_NV = None if logits_NV is None else logits_NV[np.flatnonzero(leave_N)]
        leaving = [row for row, leaves in zip(self.rows, leave_N, strict=True) if leaves]
        self._keep(~leave_N)
        return leaving, known_NV

    def _ask_one(self, guard: PolicyGuard, executed: int, x_1D: Tensor) -> Left:
        """The same for the commonest case, probe and policy in one compiled call."""
        policy, probe, rows = self.policy, self.probe, self.rows
        assert isinstance(policy, MlpPolicy)
        assert isinstance(probe, CandidateProbe)
        logit = probe.logit(executed, x_1D, policy)
        if not math.isfinite(logit):
            guard.report(policy, PolicyFaultError("features or logit are not finite"))
            rows[0].policy_failed = True
        if logit <= policy.threshold:
            return [], None
        self.rows = []
        return ([] if rows[0].policy_failed else rows), None

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
        self._policy = policy
        self._probe = probe
        self._target = target
        self._load = load
        self._frame = frame

    def asks_at(self, executed: int) -> bool:
        """At the exit it was sent to."""
        return bool(self.rows) and self._policy.exits[self._target] == executed

    def ask(self, guard: PolicyGuard, executed: int, x_ND: Tensor) -> Left:
        """As ``Asked`` says."""
        [row] = self.rows
        here = self._target
        features_1F = self._probe.features(executed, x_ND)
        outlook_1C = outlook_of(row, self._load, *self._frame)
        target = guard.route(self._policy, here, features_1F, outlook_1C)
        if target is None:
            row.policy_failed = True
        if target is None or target == len(self._policy.exits):
            self.rows = []
            return [], None
        self._target = target
        if target != here:
            return [], None
        if row.learns:
            row.open[-1].left_at = (here, features_1F[0].copy())
        self.rows = []
        return [row], self._probe.logits()

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """As ``Asked`` says."""
        self.rows = [row for row in self.rows if row in rows]


class Convener:
    """Puts rows that begin a token into the groups they are asked in.

    Args:
        bench: Builds probes.
        guard: Survives policies that fail.
        layers: Number of layers of the model.
        max_pending: Tokens a row may put off.

    Attributes:
        load: Of the engine, as the routing policies see it.
    """

    def __init__(
        self, bench: ProbeBench, guard: PolicyGuard, layers: int, max_pending: int
    ) -> None:
        self._bench = bench
        self._guard = guard
        self._frame = (layers, max_pending)
        self.load = Load()

    def convene(self, rows: Rows[Sequence], x_ND: Tensor) -> list[Asked]:
        """One group per exit policy that asks at all, and one per routed row.

        Args:
            rows: Rows that begin a token and may leave early.
            x_ND: Their embeddings.
        """
        if len(rows) == 1:
            [row] = rows
            if not row.policy.exits:
                return []
            return self._route([row], x_ND) if row.routes else self._group([row], x_ND)
        by_policy: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if row.policy.exits:
                by_policy.setdefault(index if row.routes else ~id(row.policy), []).append(index)
        found: list[Asked] = []
        for indices in by_policy.values():
            whole = len(indices) == len(rows)
            members = list(rows) if whole else [rows[index] for index in indices]
            states_ND = x_ND if whole else x_ND[indices]
            asked = self._route if members[0].routes else self._group
            found += asked(members, states_ND)
        return found

    def _group(self, rows: list[Sequence], x_ND: Tensor) -> list[Asked]:
        # A cast: to look whether an object has a protocol's methods takes longer than the rest.
        policy = cast(ExitPolicy, rows[0].policy)
        group = Group(policy, rows, self._probe(rows, x_ND))
        for row in rows:
            row.group = group
        return [group]

    def _route(self, rows: list[Sequence], x_ND: Tensor) -> list[Asked]:
        [row] = rows
        policy = cast(RoutingPolicy, row.policy)
        target = self._guard.start(policy, outlook_of(row, self.load, *self._frame))
        if target is None:
            row.policy_failed = True
        if target is None or target == len(policy.exits):
            return []
        row.group = Route(policy, row, self._probe(rows, x_ND), target, self.load, self._frame)
        return [row.group]

    def _probe(self, rows: list[Sequence], x_ND: Tensor) -> Probe:
        positions_N = np.array([row.position for row in rows], np.int32)
        drafted = [[draft.token for draft in row.drafts] for row in rows]
        ngrams = [row.ngrams for row in rows]
        return self._bench.probe(rows[0].policy, ngrams, x_ND, positions_N, drafted)
