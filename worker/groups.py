"""Rows that are probed together because they run under one policy.

Shape suffixes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policy import ExitPolicy
from offramp.worker.probes import BlankProbe, CandidateProbe, Probe, SoftmaxProbe
from offramp.worker.sequence import Sequence
from offramp.worker.stack import LayerStack


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

    def ask(self, executed: int, x_ND: Tensor) -> tuple[list[Sequence], Tensor | None]:
        """Which rows leave; they are then forgotten.

        Args:
            executed: Layers executed.
            x_ND: The rows' hidden states.

        Returns:
            The leaving rows, and their whole logits [N, V] if the probe computed them anyway.
        """
        leave_N = self.policy.leave(self.probe.features(executed, x_ND)).copy()
        if not leave_N.any():
            return [], None
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


def groups_of(stack: LayerStack, rows: Rows[Sequence], x_ND: Tensor) -> list[Group]:
    """One group per policy that asks at all.

    Args:
        stack: The model.
        rows: Rows that begin a token and may leave early.
        x_ND: Their embeddings.
    """
    by_policy: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row.request.snapshot.policy.exits:
            by_policy.setdefault(id(row.request.snapshot.policy), []).append(index)
    groups = []
    for indices in by_policy.values():
        members = [rows[index] for index in indices]
        policy = members[0].request.snapshot.policy
        states_ND = x_ND if len(indices) == len(rows) else x_ND[indices]
        group = Group(policy, members, _probe(stack, policy, members, states_ND))
        for row in members:
            row.group = group
        groups.append(group)
    return groups


def _probe(stack: LayerStack, policy: ExitPolicy, rows: list[Sequence], x_ND: Tensor) -> Probe:
    if policy.schema is None:
        return BlankProbe()
    if policy.schema != CANDIDATES_V1:
        return SoftmaxProbe(stack)
    table_VK = policy.candidates_VK
    assert table_VK is not None  # the engine admits no candidate policy without a table
    candidates = [
        row.ngrams.candidates(table_VK, [draft.token for draft in row.drafts])
        for row in rows
        if row.ngrams is not None
    ]
    positions_N = np.asarray([row.position for row in rows], np.int32)
    return CandidateProbe(
        stack, np.asarray(candidates, np.int32), x_ND, positions_N, len(policy.exits)
    )
