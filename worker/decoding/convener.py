"""Who is asked together at the exits, and with which probe.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import cast

import numpy as np
from torch import Tensor

from offramp.controller.policies.protocols import ExitPolicy, RoutingPolicy
from offramp.worker.decoding.groups import Asked, FusedGroup, Group, Route
from offramp.worker.decoding.guard import PolicyGuard
from offramp.worker.decoding.outlook import Load, outlook_of
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.probes import FusedProbe, Probe, ProbeBench
from offramp.worker.probes.candidates.successors import NgramIndex


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
        if not rows:
            return []
        first = rows[0]
        if len(rows) == 1 or (not first.routes and all(row.policy is first.policy for row in rows)):
            if not first.policy.exits:
                return []
            return self._route([first], x_ND) if first.routes else self._group(list(rows), x_ND)
        by_policy: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if row.policy.exits:
                by_policy.setdefault(index if row.routes else ~id(row.policy), []).append(index)
        found: list[Asked] = []
        for indices in by_policy.values():
            members = [rows[index] for index in indices]
            asked = self._route if members[0].routes else self._group
            found += asked(members, x_ND[indices])
        return found

    def _group(self, rows: list[Sequence], x_ND: Tensor) -> list[Asked]:
        probe = self._probe(rows, x_ND)
        group: Asked
        if isinstance(probe, FusedProbe) and probe.policy is not None:
            group = FusedGroup(probe.policy, rows, probe)
        else:
            # A cast: to look whether an object has a protocol's methods takes longer than the rest.
            group = Group(cast(ExitPolicy, rows[0].policy), rows, probe)
        for row in rows:
            row.group = group
        rows[0].led = group
        return [group]

    def _route(self, rows: list[Sequence], x_ND: Tensor) -> list[Asked]:
        [row] = rows
        policy = cast(RoutingPolicy, row.policy)
        target = self._guard.start(policy, outlook_of(row, self.load, *self._frame))
        if target is None:
            row.policy_failed = True
        if target is None or target == len(policy.exits):
            return []
        route = Route(policy, row, self._probe(rows, x_ND), target, self.load, self._frame)
        row.group = row.led = route
        return [route]

    def _probe(self, rows: list[Sequence], x_ND: Tensor) -> Probe:
        positions = [row.position for row in rows]
        ngrams = [row.ngrams for row in rows]
        # Of what was drafted, candidates depend on the last two.
        drafted = [[draft.token for draft in row.drafts[-2:]] if row.drafts else () for row in rows]
        fused = self._fused(rows)
        if fused is None:
            positions_N = np.array(positions, np.int32)
            return self._bench.probe(rows[0].policy, ngrams, x_ND, positions_N, drafted)
        fused.begin(cast(list[NgramIndex], ngrams), drafted, x_ND, positions)
        return fused

    def _fused(self, rows: list[Sequence]) -> FusedProbe | None:
        """The last one that the first row led with, or a new one while others need that."""
        led = rows[0].led
        if led is not None and not _is_underway(led):
            last = led.probe
            if isinstance(last, FusedProbe) and last.places >= len(rows):
                return last
        return self._bench.fused_probe(rows[0].policy, len(rows))


def _is_underway(group: Asked) -> bool:
    """Whether some of its rows are still on their way."""
    return any(row.group is group for row in group.rows)
