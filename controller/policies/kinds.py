"""Every kind of policy that a release can carry: one line per kind.

A worker that does not know a release's kind refuses it by name.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.codec import (
    CLOSE_LOGIT,
    Kind,
    Params,
    PolicyParts,
    Tensors,
    pack_layers,
    unpack_layers,
)
from offramp.controller.policies.drafts import (
    ConfidentDraft,
    DelDraft,
    DraftRouter,
    StaticDraft,
    ThompsonDraft,
)
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.policies.router import MlpRouter
from offramp.controller.policies.rules.bandit import THRESHOLD_BANDIT
from offramp.controller.policies.rules.beta import BETA_THRESHOLD
from offramp.controller.policies.rules.decay import DECAYING_THRESHOLD
from offramp.controller.policies.rules.entropy_patience import ENTROPY, PATIENCE
from offramp.controller.policies.rules.optimal_stopping import STOPPING
from offramp.controller.policies.rules.position import POSITION_SCHEDULE
from offramp.controller.policies.rules.stages import STAGE_THRESHOLDS
from offramp.controller.strict import COUNT, NUMBER, TEXT, Check, list_of, or_null

_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")


def _build_fixed(parts: PolicyParts) -> FixedExit:
    return FixedExit(parts.only_exit, parts.schema, parts.candidates_VK)


def _describe_mlp(policy: MlpPolicy) -> tuple[Params, Tensors]:
    return {"threshold": float(policy.threshold)}, pack_layers(policy.weights)


def _build_mlp(parts: PolicyParts) -> MlpPolicy:
    weights = unpack_layers(parts.tensors)
    threshold = parts.params["threshold"]
    return MlpPolicy(parts.exits, parts.required_schema, weights, threshold, parts.candidates_VK)


def _clear_mlp(policy: MlpPolicy, features_NF: FloatArray, _outlook_NC: FloatArray) -> BoolArray:
    # One row at a time: so that the logit is the one that a lone row gets.
    distances = [abs(policy.logits(row[None])[0] - policy.threshold) for row in features_NF]
    return np.asarray(distances) > CLOSE_LOGIT


def _describe_router(policy: MlpRouter) -> tuple[Params, Tensors]:
    params = {"ends": policy.ends, "first": policy.first if isinstance(policy.first, int) else None}
    tensors = pack_layers(policy.weights)
    if not isinstance(policy.first, int):
        tensors |= pack_layers(list(policy.first), "start")
    return params, tensors


def _build_router(parts: PolicyParts) -> MlpRouter:
    first = parts.params["first"]
    return MlpRouter(
        parts.exits,
        parts.required_schema,
        unpack_layers(parts.tensors),
        first=unpack_layers(parts.tensors, "start") if first is None else int(first),
        ends=parts.params["ends"],
        candidates_VK=parts.candidates_VK,
    )


def _clear_router(policy: MlpRouter, features_NF: FloatArray, outlook_NC: FloatArray) -> BoolArray:
    return policy.lead(features_NF, outlook_NC) > CLOSE_LOGIT


def _build_static(parts: PolicyParts) -> StaticDraft:
    return StaticDraft(layer=parts.only_exit, **parts.params)


def _build_confident(parts: PolicyParts) -> ConfidentDraft:
    table_VK = parts.candidates_VK
    return ConfidentDraft(layer=parts.only_exit, candidates_VK=table_VK, **parts.params)


def _describe_thompson(policy: ThompsonDraft) -> tuple[Params, Tensors]:
    policy.rewind()  # so that who unpacks it draws what the canned inputs drew
    names = ("alpha", "beta", "length", "max_pending", "seed")
    return {name: getattr(policy, name) for name in names}, {}


def _build_thompson(parts: PolicyParts) -> ThompsonDraft:
    return ThompsonDraft(parts.only_exit, **parts.params)


def _describe_del(policy: DelDraft) -> tuple[Params, Tensors]:
    return {
        "layers": policy.layers,
        "acceptance": policy.acceptance_E.tolist(),
        "thresholds": policy.threshold_E.tolist(),
        "omega": policy.omega,
        "max_pending": policy.max_pending,
    }, {}


def _build_del(parts: PolicyParts) -> DelDraft:
    return DelDraft(parts.exits, **parts.params)


def _describe_drafter(policy: DraftRouter) -> tuple[Params, Tensors]:
    tensors = pack_layers(policy.starter.weights, "starter")
    tensors |= pack_layers(policy.router.weights, "router")
    return {"max_pending": policy.max_pending}, tensors


def _build_drafter(parts: PolicyParts) -> DraftRouter:
    nets = (unpack_layers(parts.tensors, "starter"), unpack_layers(parts.tensors, "router"))
    return DraftRouter(parts.exits, *nets, candidates_VK=parts.candidates_VK, **parts.params)


def _clear_drafter(
    policy: DraftRouter, features_NF: FloatArray, outlook_NC: FloatArray
) -> BoolArray:
    everywhere = range(len(policy.exits))
    routed = [policy.route_logits(here, features_NF, outlook_NC) for here in everywhere]
    ordered_PNA = np.sort([policy.start_logits(outlook_NC), *routed], axis=-1)
    lead_PN = ordered_PNA[:, :, -1] - ordered_PNA[:, :, -2]
    return np.asarray((lead_PN > CLOSE_LOGIT).all(0))


_SHIPPED = (
    Kind(name="never", type=NeverExit, needs_schema=False),
    Kind(name="fixed", type=FixedExit, build=_build_fixed),
    Kind(name="threshold", type=ThresholdPolicy, params={"column": TEXT, "threshold": NUMBER}),
    Kind(
        name="mlp",
        type=MlpPolicy,
        params={"threshold": NUMBER},
        describe=_describe_mlp,
        build=_build_mlp,
        clear=_clear_mlp,
    ),
    Kind(
        name="router",
        type=MlpRouter,
        params={"ends": _FLAG, "first": or_null(COUNT)},
        describe=_describe_router,
        build=_build_router,
        clear=_clear_router,
    ),
    DECAYING_THRESHOLD,
    ENTROPY,
    PATIENCE,
    POSITION_SCHEDULE,
    STAGE_THRESHOLDS,
    BETA_THRESHOLD,
    THRESHOLD_BANDIT,
    STOPPING,
    Kind(
        name="draft-static",
        type=StaticDraft,
        params={"length": COUNT, "max_pending": COUNT},
        build=_build_static,
    ),
    Kind(
        name="draft-confident",
        type=ConfidentDraft,
        params={"length": COUNT, "max_pending": COUNT, "threshold": NUMBER},
        build=_build_confident,
    ),
    Kind(
        name="draft-thompson",
        type=ThompsonDraft,
        params={
            "alpha": NUMBER,
            "beta": NUMBER,
            "length": COUNT,
            "max_pending": COUNT,
            "seed": COUNT,
        },
        describe=_describe_thompson,
        build=_build_thompson,
    ),
    Kind(
        name="draft-del",
        type=DelDraft,
        params={
            "layers": COUNT,
            "acceptance": list_of(NUMBER),
            "thresholds": list_of(NUMBER),
            "omega": NUMBER,
            "max_pending": COUNT,
        },
        describe=_describe_del,
        build=_build_del,
    ),
    Kind(
        name="draft-router",
        type=DraftRouter,
        params={"max_pending": COUNT},
        describe=_describe_drafter,
        build=_build_drafter,
        clear=_clear_drafter,
    ),
)

KINDS: MappingProxyType[str, Kind] = MappingProxyType({kind.name: kind for kind in _SHIPPED})
"""Kinds by name."""


def kind_of(policy: Any) -> Kind:
    """The kind that packs a policy.

    Raises:
        RequestError: no kind packs its type.
    """
    for kind in KINDS.values():
        if kind.type is type(policy):
            return kind
    raise RequestError(
        "policy", f"{type(policy).__name__} cannot be packed", "Add its kind to controller.kinds"
    )
