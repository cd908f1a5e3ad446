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
from offramp.controller.policies.drafts.draft_kinds import DRAFT_KINDS
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
from offramp.controller.strict import COUNT, NUMBER, TEXT, Check, or_null

_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")


def _nothing(_policy: Any) -> tuple[Params, Tensors]:
    return {}, {}


def _build_never(parts: PolicyParts) -> NeverExit:
    return NeverExit(parts.exits, parts.schema, parts.candidates_VK)


def _build_fixed(parts: PolicyParts) -> FixedExit:
    if len(parts.exits) != 1:
        raise RequestError("exits", f"{parts.exits} is not one layer")
    return FixedExit(parts.exits[0], parts.schema, parts.candidates_VK)


def _describe_threshold(policy: ThresholdPolicy) -> tuple[Params, Tensors]:
    return {"column": policy.column, "threshold": float(policy.threshold)}, {}


def _build_threshold(parts: PolicyParts) -> ThresholdPolicy:
    schema, params = parts.required_schema, parts.params
    return ThresholdPolicy(
        parts.exits, schema, params["column"], params["threshold"], parts.candidates_VK
    )


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


_SHIPPED = (
    Kind(name="never", type=NeverExit, describe=_nothing, build=_build_never),
    Kind(name="fixed", type=FixedExit, describe=_nothing, build=_build_fixed),
    Kind(
        name="threshold",
        type=ThresholdPolicy,
        params={"column": TEXT, "threshold": NUMBER},
        describe=_describe_threshold,
        build=_build_threshold,
    ),
    Kind(
        name="mlp",
        type=MlpPolicy,
        params={"threshold": NUMBER},
        describe=_describe_mlp,
        build=_build_mlp,
        clear=_clear_mlp,
    ),
    *DRAFT_KINDS,
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
