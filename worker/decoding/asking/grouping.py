"""Which rows are asked together at the exits, and with which probe.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import cast

import numpy as np
import torch
from torch import Tensor

from offramp.controller.policies.protocols import ExitPolicy, RoutingPolicy
from offramp.worker.decoding.asking.groups import DecidedGroup, ExitGroup
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.asking.outlook import Load, outlook_of
from offramp.worker.decoding.asking.routed import RoutedGroup
from offramp.worker.decoding.sequence import RowGroup, Sequence
from offramp.worker.model.transfers import take
from offramp.worker.probes import DeviceProbe, FusedProbe, Probe, ProbeFactory
from offramp.worker.probes.candidates.successors import NgramIndex
from offramp.worker.probes.probe import Scores


class RowGrouper:
    """Puts rows that begin a token into the groups they are asked in.

    Args:
        probes: Makes the probes that policies read.
        guard: Survives policies that fail.
        layers: Number of layers of the model.
        max_pending: Tokens of a row that may be pending.

    Attributes:
        load: Rows running and waiting in the engine, as routing policies see them.
    """

    def __init__(
        self, probes: ProbeFactory, guard: PolicyGuard, layers: int, max_pending: int
    ) -> None:
        self._probes = probes
        self._guard = guard
        self._limits = (layers, max_pending)
        self.load = Load()

    def group_rows(self, rows: Rows[Sequence], x_ND: Tensor) -> list[RowGroup]:
        """Make one group per policy that asks at all.

        Args:
            rows: Rows that begin a token and may leave early.
            x_ND: Embeddings of the tokens that they begin.
        """
        if not rows:
            return []
        by_policy: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            if row.policy.exits:
                by_policy.setdefault(id(row.policy), []).append(index)
        found: list[RowGroup] = []
        for indices in by_policy.values():
            members = [rows[index] for index in indices]
            states_ND = x_ND if len(members) == len(rows) else take(x_ND, indices)
            found += (self._route if members[0].routes else self._group)(members, states_ND)
        return found

    def _group(self, rows: list[Sequence], x_ND: Tensor) -> list[RowGroup]:
        for row in rows:  # one that comes from the copy needs nothing of its group there
            row.group = None
        probe = self._probe(rows, x_ND)
        group: RowGroup
        if isinstance(probe, FusedProbe | DeviceProbe) and probe.policy is not None:
            group = DecidedGroup(probe.policy, rows, probe)
        else:
            # A cast: to look whether an object has a protocol's methods takes longer than the rest.
            group = ExitGroup(cast(ExitPolicy, rows[0].policy), rows, probe)
        for row in rows:
            row.group = group
        rows[0].last_group = group
        return [group]

    def _route(self, rows: list[Sequence], x_ND: Tensor) -> list[RowGroup]:
        policy = cast(RoutingPolicy, rows[0].policy)
        # On the copy a row may have been sent on to one of our exits.
        sent = [
            row.group.target_of(row) if isinstance(row.group, RoutedGroup) else None for row in rows
        ]
        new = [row for row, target in zip(rows, sent, strict=True) if target is None]
        if new:
            first = iter(self._guard.start(policy, outlook_of(new, self.load, *self._limits)))
            sent = [next(first) if target is None else target for target in sent]
        going: list[int] = []
        for index, (row, target) in enumerate(zip(rows, sent, strict=True)):
            row.group = None
            if target is None:
                row.fail_policy()
            elif target < len(policy.exits):
                going.append(index)
        if not going:
            return []
        if len(going) < len(rows):
            rows, x_ND = [rows[index] for index in going], take(x_ND, going)
        targets = [target for target in sent if target is not None and target < len(policy.exits)]
        route = RoutedGroup(policy, rows, self._probe(rows, x_ND), targets, self.load, self._limits)
        for row in rows:
            row.group = route
        rows[0].last_group = route
        return [route]

    def _probe(self, rows: list[Sequence], x_ND: Tensor) -> Probe:
        positions = [row.position for row in rows]
        ngrams = [row.ngrams for row in rows]
        # Of what was drafted, candidates depend on the last two.
        drafted = [[draft.token for draft in row.drafts[-2:]] if row.drafts else () for row in rows]
        fused = self._fused(rows)
        if fused is None:
            positions_N = np.array(positions, np.int32)
            scores = [_scores(row) for row in rows]
            return self._probes.probe(rows[0].policy, ngrams, x_ND, positions_N, drafted, scores)
        fused.begin(cast(list[NgramIndex], ngrams), drafted, x_ND, positions)
        return fused

    def _fused(self, rows: list[Sequence]) -> FusedProbe | None:
        """Use the probe of the first row's last group again, or make one while others need that.

        What a fused probe works on takes longer to make than a decision takes: so it is made once,
        and begun anew with every token.
        """
        last_group = rows[0].last_group
        if last_group is not None and not _is_underway(last_group):
            last = last_group.probe
            if isinstance(last, FusedProbe) and last.places >= len(rows):
                return last
        return self._probes.fused_probe(rows[0].policy, len(rows))


def _scores(row: Sequence) -> Scores | None:
    """How a row's next draft is drawn; None where that is the likeliest token, or no draft."""
    if row.request.kv_mode != "verify" or row.sampler.is_plain_greedy:
        return None
    history = [*row.emitted, *(draft.token for draft in row.drafts)]

    def scores(logits_V: Tensor) -> Tensor:
        try:
            return row.sampler.draw_scores(logits_V, history)
        except (
            Exception
        ):  # a caller's code: full depth's draw will fail, too, and for its row alone
            return logits_V.to("cpu", torch.float32)

    return scores


def _is_underway(group: RowGroup) -> bool:
    """Whether some row of a group is still on its way, and needs what its probe remembers."""
    return any(row.group is group for row in group.rows)
