"""Rows that are asked together because they run under one policy.

Shape suffixes: N rows, D width, V vocabulary, F features, C columns of outlook.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Generic, TypeVar, cast

import numpy as np
from torch import Tensor

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.sequence import Leaving, Sequence
from offramp.worker.model.transfers import take
from offramp.worker.probes import Decider, Probe

NOBODY = Leaving([])

P = TypeVar("P", bound=Probe)


class PolicyGroup(Generic[P]):
    """Rows under one exit policy, and what their probe remembers of them.

    Args:
        policy: The policy that all rows run under.
        rows: The rows, in the order of the probe's.
        probe: Computes the policy's features.
    """

    def __init__(self, policy: ExitPolicy, rows: list[Sequence], probe: P) -> None:
        self.policy = policy
        self.rows = rows
        self.probe = probe

    @property
    def exits(self) -> tuple[int, ...]:
        """The policy's exits: layers after which all rows are asked."""
        return self.policy.exits

    def exits_of(self, row: Sequence) -> tuple[int, ...]:
        """The same for each row."""
        return self.policy.exits

    def asked_at(self, executed: int) -> list[Sequence]:
        """All rows, if this is one of the policy's exits."""
        return self.rows if executed in self.policy.exits else []

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget rows that were cancelled while they waited at a hold."""
        stay_N = np.asarray([row in rows for row in self.rows], np.bool_)
        if not stay_N.all():
            self._keep(stay_N)

    def _keep(self, stay_N: BoolArray) -> None:
        self.probe.keep(stay_N)
        self.rows = [row for row, stays in zip(self.rows, stay_N, strict=True) if stays]


class ExitGroup(PolicyGroup[Probe]):
    """Rows whose probe computes features, which the policy is then asked about."""

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Leaving:
        """Probe the rows and ask the policy; if it fails, it fails for all of them."""
        features_NF = self.probe.features(int(executed), x_N1D[:, 0])
        leave_N = guard.decide(self.policy, features_NF)
        if leave_N is None:
            for row in self.rows:
                row.fail_policy()
            self.rows = []
            return NOBODY
        if not leave_N.any():
            return NOBODY
        if self.rows[0].learns:
            self._note(self.policy.exits.index(executed), leave_N, features_NF)
        if leave_N.all():  # as always at batch 1: nothing is left to be sorted out
            leaving, self.rows = self.rows, []
            return Leaving(leaving, self.probe.logits())
        # The answer lies in a buffer of the policy's, which its next decision overwrites.
        leave_N = leave_N.copy()
        logits_NV = self.probe.logits()
        known_NV = None if logits_NV is None else take(logits_NV, np.flatnonzero(leave_N).tolist())
        leaving = [row for row, leaves in zip(self.rows, leave_N, strict=True) if leaves]
        self._keep(~leave_N)
        return Leaving(leaving, known_NV)

    def _note(self, here: int, leave_N: BoolArray, features_NF: FloatArray) -> None:
        """Record where rows leave, for the verdict that full depth will pass on them."""
        for row, leaves, features_F in zip(self.rows, leave_N, features_NF, strict=True):
            if leaves:  # a copy: a probe may use its buffer again at the next exit
                row.open[-1].left_at = (here, features_F.copy())


class DecidedGroup(PolicyGroup[Decider]):
    """Rows whose probe and policy are one call, compiled or on the device."""

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Leaving:
        """Probe and decide at once; a row whose features are not finite fails alone."""
        leaving, failed = self.probe.leaving(int(executed), x_N1D)
        if not leaving and not failed:
            return NOBODY
        rows = self.rows
        gone = {*leaving, *failed}
        self.rows = [row for place, row in enumerate(rows) if place not in gone]
        if failed:
            fault = PolicyFaultError("features or logit are not finite")
            guard.report(cast(MlpPolicy, self.policy), fault)
            for place in failed:
                rows[place].fail_policy()
        return Leaving([rows[place] for place in leaving])
