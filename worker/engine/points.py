"""Which policy a request runs under: its own, a bundle's, the current one, or a certified point.

A request that asks for time or energy gets the point of the certified frontier that fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from offramp.controller.adapters.adapter_folder import HEADS_KIND
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import RequestError
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certified_points import (
    BUDGET,
    WEIGHT,
    PricedPoint,
    Target,
    certified_points,
    full_depth,
    pick,
)
from offramp.controller.release.manifest import Manifest
from offramp.worker.decoding.request import FULL_DEPTH, KVMode, PolicySnapshot
from offramp.worker.engine.admission import require_fit, require_policy
from offramp.worker.model.stack import LayerStack

MOST_RELEASES = 4
"""Releases whose points are remembered: the current one, its canary, and those before them."""

Asked = Policy | PolicySnapshot | PolicyBundle | None
"""What a request may be pinned to: a bundle is checked against the model; None: the current one."""


def pinned(
    policy: Asked, current: Callable[[], PolicySnapshot], stack: LayerStack, loaded: Loaded
) -> PolicySnapshot:
    """The snapshot that a request runs under: of its own policy, or the current one.

    Raises:
        RequestError: see ``Loaded.snapshot_of`` and ``require_fit``.
    """
    if policy is None:
        return current()
    if isinstance(policy, PolicyBundle):
        policy = loaded.snapshot_of(policy)
    if isinstance(policy, PolicySnapshot):
        require_policy(policy.policy, stack.layers, stack.width)
        return policy
    require_fit(policy, stack)
    return PolicySnapshot(0, "", policy)


class Loaded:
    """What a loaded model has, and so what a bundle has to be made for.

    Args:
        model: Fingerprint of the weights.
        tokenizer: Fingerprint of the vocabulary; "" without one.
        adapters: Digest of what exits are read through; "" for none.
    """

    def __init__(self, model: str, tokenizer: str, adapters: str) -> None:
        self._model, self._tokenizer, self._adapters = model, tokenizer, adapters
        self._last: tuple[PolicyBundle, PolicySnapshot] | None = None

    def snapshot_of(self, bundle: PolicyBundle) -> PolicySnapshot:
        """The bundle's policy with its certificate; of the same bundle again, the same policy.

        Raises:
            RequestError: it is for another model, tokenizer or adapters, or for a classification.
        """
        if self._last is None or self._last[0] is not bundle:
            manifest = bundle.manifest
            self._require(manifest)
            policy = bundle.policy()
            snapshot = PolicySnapshot(0, manifest.digest, policy, manifest.certificate)
            self._last = (bundle, snapshot)
        return self._last[1]

    def _require(self, manifest: Manifest) -> None:
        if manifest.training.get("task") == HEADS_KIND:
            raise RequestError("policy", "was learned on a classification", "Train one on tokens")
        for what, theirs, ours in (
            ("model", manifest.model, self._model),
            ("tokenizer", manifest.tokenizer, self._tokenizer or manifest.tokenizer),
            ("adapters", manifest.adapters or self._adapters, self._adapters),
        ):
            if theirs != ours:
                own = ours[:12] or "none"
                problem = f"was made for {what} {theirs[:12]}, and the engine has {own}"
                raise RequestError("policy", problem, "Load what it names, or train one for this")


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
