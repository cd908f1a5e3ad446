"""Rows that are asked together because they run under one policy, and rows that are asked alone.

Shape suffixes: N rows, D width, V vocabulary, F features, C columns of outlook.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import numpy as np
from torch import Tensor

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, RoutingPolicy
from offramp.worker.decoding.guard import PolicyGuard
from offramp.worker.decoding.sequence import Leaving, Sequence
from offramp.worker.model.transfers import take
from offramp.worker.probes import Candidates, Decider, Probe

TOKENS_SCALE = 256
"""Divides counts of tokens so that the columns are of order one."""

MOST_WAITING = 8.0
"""Requests in line / slots; more counts as this."""

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

    def asks_at(self, executed: int) -> bool:
        """Whether rows are left, and this is one of the policy's exits."""
        return executed in self.policy.exits and bool(self.rows)

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


class RoutedRow:
    """One row whose policy says at which exit it is asked next.

    It is asked alone, since rows part ways: a probe remembers what it saw of a row at its last
    exit, and the next exit of two rows is rarely the same.

    Args:
        policy: The routing policy that the row runs under.
        row: The row that is asked.
        probe: Computes the policy's features.
        target: Index of the exit it is asked at next.
        load: Rows running and waiting in the engine, as the outlook shows them.
        limits: Number of layers, and of tokens of the row that may be pending.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        row: Sequence,
        probe: Probe,
        target: int,
        load: Load,
        limits: tuple[int, int],
    ) -> None:
        self.rows = [row]
        self.probe = probe
        self._policy = policy
        self.target = target
        self._load = load
        self._limits = limits

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits at which the row may yet be asked: never one before its target."""
        return self._policy.exits[self.target :]

    def asks_at(self, executed: int) -> bool:
        """Whether the row is still asked, and this is the exit that it was sent to."""
        return bool(self.rows) and self._policy.exits[self.target] == executed

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Leaving:
        """Probe the row; its policy lets it leave here, or sends it to a deeper exit."""
        [row] = self.rows
        here = self.target
        features_1F = self.probe.features(int(executed), x_N1D[:, 0])
        outlook_1C = outlook_of(row, self._load, *self._limits)
        target = guard.route(self._policy, here, features_1F, outlook_1C)
        if target is None:
            row.fail_policy()
        if target is None or target == len(self._policy.exits):
            self.rows = []  # it runs to the end, and is not asked again on the way
            return NOBODY
        self.target = target
        if target != here:
            return NOBODY
        if row.learns:
            row.open[-1].left_at = (here, features_1F[0].copy())
        self.rows = []
        if row.headless:
            return Leaving([row], token=int(cast(Candidates, self.probe).best_N()[0]))
        return Leaving([row], self.probe.logits())

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget the row if it was cancelled while it waited at a hold."""
        self.rows = [row for row in self.rows if row in rows]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is.

    Attributes:
        active: Number of rows that run.
        waiting: Requests in line.
        slots: Rows that can run.
    """

    active: int = 1
    waiting: int = 0
    slots: int = 1


def outlook_of(row: Sequence, load: Load, layers: int, max_pending: int) -> FloatArray:
    """The columns of a row that is about to begin a token or is on its way, [1, C].

    Args:
        row: The row; its newest token is open.
        load: Rows that run and wait in the engine.
        layers: Number of layers of the model.
        max_pending: Tokens a row may have pending.
    """
    made = len(row.emitted) + len(row.drafts)
    left = row.request.sampling.max_tokens - made
    # In ``defer`` neighbours may have taken pending tokens along, which must change no decision.
    pending = row.early if row.request.kv_mode == "defer" else len(row.open) - 1
    pending = 0 if row.projects else pending
    last = row.drafts[-1].exit_layer if row.drafts else row.exit_layers[-1]
    return np.array(
        [
            (
                made / TOKENS_SCALE,
                max(0, left) / TOKENS_SCALE,
                pending / max(1, max_pending),
                row.debt,
                row.acceptance,
                last / layers,
                load.active / load.slots,
                min(load.waiting / load.slots, MOST_WAITING),
            )
        ],
        np.float32,
    )
