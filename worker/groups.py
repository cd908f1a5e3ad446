"""Rows that are probed together because they run under one policy.

Shape suffixes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from torch import Tensor

from offramp.controller.policy import ExitPolicy
from offramp.worker.guard import PolicyGuard
from offramp.worker.probes import Probe, ProbeBench
from offramp.worker.sequence import Sequence


class Group:
    """Rows on their way through the stack, and what their policy's probe remembers of them.

    Args:
        policy: Theirs.
        rows: In the order of the probe's rows.
        probe: Computes the policy's features.
    """

    def __init__(self, policy: ExitPolicy, rows: list[Sequence], probe: Probe) -> None:
        self.policy = policy
        self.rows = rows
        self.probe = probe

    def ask(
        self, guard: PolicyGuard, executed: int, x_ND: Tensor
    ) -> tuple[list[Sequence], Tensor | None]:
        """Which rows leave; they are then forgotten.

        If the policy fails none leaves, and none is asked again until its request ends.

        Args:
            guard: Survives the policy's failures.
            executed: Layers executed.
            x_ND: The rows' hidden states.

        Returns:
            The leaving rows, and their whole logits [N, V] if the probe computed them anyway.
        """
        leave_N = guard.decide(self.policy, self.probe.features(executed, x_ND))
        if leave_N is None:
            for row in self.rows:
                row.policy_failed = True
            self.rows = []
            return [], None
        if leave_N.all():  # as always at batch 1: nothing is left to be sorted out
            leaving, self.rows = self.rows, []
            return leaving, self.probe.logits()
        if not leave_N.any():
            return [], None
        leave_N = leave_N.copy()
        logits_NV = self.probe.logits()
        known_NV = None if logits_NV is None else logits_NV[np.flatnonzero(leave_N)]
        leaving = [row for row, leaves in zip(self.rows, leave_N, strict=True) if leaves]
        self._keep(~leave_N)
        return leaving, known_NV

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget rows that were cancelled while they waited."""
        stay_N = np.asarray([row in rows for row in self.rows], np.bool_)
        if not stay_N.all():
            self._keep(stay_N)

    def _keep(self, stay_N: np.ndarray) -> None:
        self.probe.keep(stay_N)
        self.rows = [row for row, stays in zip(self.rows, stay_N, strict=True) if stays]


def groups_of(bench: ProbeBench, rows: Rows[Sequence], x_ND: Tensor) -> list[Group]:
    """One group per policy that asks at all.

    Args:
        bench: Builds the probes.
        rows: Rows that begin a token and may leave early.
        x_ND: Their embeddings.
    """
    by_policy: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        policy = row.request.snapshot.policy
        if policy.exits:
            by_policy.setdefault(id(policy), []).append(index)
    groups = []
    for indices in by_policy.values():
        whole = len(indices) == len(rows)
        members = list(rows) if whole else [rows[index] for index in indices]
        groups.append(_group(bench, members, x_ND if whole else x_ND[indices]))
    return groups


def _group(bench: ProbeBench, rows: list[Sequence], x_ND: Tensor) -> Group:
    policy = rows[0].request.snapshot.policy
    positions_N = np.array([row.position for row in rows], np.int32)
    drafted = [[draft.token for draft in row.drafts] for row in rows]
    ngrams = [row.ngrams for row in rows]
    group = Group(policy, rows, bench.probe(policy, ngrams, x_ND, positions_N, drafted))
    for row in rows:
        row.group = group
    return group
