"""Gives a request that asks for time or energy the point of the certified frontier that fits."""

from __future__ import annotations

from dataclasses import replace

import torch

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import RequestError
from offramp.controller.release.certified_points import (
    BUDGET,
    WEIGHT,
    PricedPoint,
    Target,
    certified_points,
    full_depth,
    pick,
)
from offramp.worker.decoding.request import FULL_DEPTH, KVMode, PolicySnapshot

MOST_RELEASES = 4
"""Releases whose points are remembered: the current one, its canary, and those before them."""


class PointPicker:
    """Picks points of releases.

    Args:
        costs: What tokens cost here; None if nobody has measured it.
        own: The engine's mode.
        dtype: Number format of the weights.
    """

    def __init__(self, costs: CostTable | None, own: KVMode, dtype: torch.dtype) -> None:
        self._costs = costs
        self._own = own
        self._dtype = str(dtype).removeprefix("torch.")
        # The same points for all requests: rows under one policy are asked together.
        self._certified: dict[tuple[str, str], tuple[PricedPoint, ...]] = {}

    def pick(self, snapshot: PolicySnapshot, target: Target, adapters: str) -> PolicySnapshot:
        """The snapshot at the point that a request asks for; full depth is the built-in one.

        Args:
            snapshot: What the request would run under otherwise.
            target: What it asks for.
            adapters: Digest of what its exits are read through.

        Raises:
            RequestError: nothing is known of times here, or no point fits.
        """
        if self._costs is None:
            field = WEIGHT if target.latency_budget_ms is None else BUDGET
            raise RequestError(
                field, "this pool knows no costs to predict from", "Serve it with --costs"
            )
        points = [full_depth(self._costs)]
        certificate = snapshot.certificate
        if certificate is not None and certificate.delta + (target.quality or 0) <= 1 + 1e-9:
            points += self._points(snapshot, adapters)
        point = pick(points, target)
        if point is points[0]:
            return FULL_DEPTH
        return replace(snapshot, policy=point.policy, setting=point.setting)

    def _points(self, snapshot: PolicySnapshot, adapters: str) -> tuple[PricedPoint, ...]:
        certificate = snapshot.certificate
        assert certificate is not None
        assert self._costs is not None
        if self._own != "project" or certificate.gap(
            kv_mode=self._own, dtype=self._dtype, translators=adapters
        ):
            return ()
        key = (certificate.policy, adapters)
        if key not in self._certified:
            if len(self._certified) == MOST_RELEASES:
                del self._certified[next(iter(self._certified))]
            self._certified[key] = certified_points(snapshot.policy, certificate, self._costs)
        return self._certified[key]
