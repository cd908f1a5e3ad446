"""Who is asked together at the exits, and with which probe.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import cast

import numpy as np
from torch import Tensor

from offramp.controller.policy import ExitPolicy, RoutingPolicy
from offramp.worker.groups import Asked, Group, Route, Solo
from offramp.worker.guard import PolicyGuard
from offramp.worker.outlook import Load, outlook_of
from offramp.worker.probes import Probe, ProbeBench, RowProbe
from offramp.worker.sequence import Sequence


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
        probe = self._probe(rows, x_ND)
        group: Asked
        if isinstance(probe, RowProbe) and probe.policy is not None:
            group = Solo(probe.policy, rows[0], probe)
        else:
            # A cast: to look whether an object has a protocol's methods takes longer than the rest.
            group = Group(cast(ExitPolicy, rows[0].policy), rows, probe)
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
        if len(rows) == 1:
            [row] = rows
            if row.probe is None:
                row.probe = self._bench.row_probe(row.policy, row.ngrams)
            if row.probe is not None:
                row.probe.begin([draft.token for draft in row.drafts], x_ND, row.position)
                return row.probe
        positions_N = np.array([row.position for row in rows], np.int32)
        drafted = [[draft.token for draft in row.drafts] for row in rows]
        ngrams = [row.ngrams for row in rows]
        return self._bench.probe(rows[0].policy, ngrams, x_ND, positions_N, drafted)
