"""How drafting policies are packed: one ``Kind`` each.

Shape suffixes: N canned rows, F features, C columns of outlook.
"""

from __future__ import annotations

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
)
from offramp.controller.policies.codec import unpack_layers as unpacked
from offramp.controller.policies.drafts.confident import ConfidentDraft
from offramp.controller.policies.drafts.del_rule import DelDraft
from offramp.controller.policies.drafts.draft_router import DraftRouter
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.drafts.thompson import ThompsonDraft
from offramp.controller.strict import COUNT, NUMBER, list_of


def _one_exit(parts: PolicyParts) -> int:
    if len(parts.exits) != 1:
        raise RequestError("exits", f"{parts.exits} is not one layer")
    return parts.exits[0]


def _describe_static(policy: StaticDraft) -> tuple[Params, Tensors]:
    return {"length": policy.length, "max_pending": policy.max_pending}, {}


def _build_static(parts: PolicyParts) -> StaticDraft:
    return StaticDraft(layer=_one_exit(parts), **parts.params)


def _describe_confident(policy: ConfidentDraft) -> tuple[Params, Tensors]:
    threshold = float(policy.threshold)
    params = {"length": policy.length, "max_pending": policy.max_pending, "threshold": threshold}
    return params, {}


def _build_confident(parts: PolicyParts) -> ConfidentDraft:
    table_VK = parts.candidates_VK
    return ConfidentDraft(layer=_one_exit(parts), candidates_VK=table_VK, **parts.params)


def _describe_thompson(policy: ThompsonDraft) -> tuple[Params, Tensors]:
    policy.rewind()  # so that who unpacks it draws what the canned inputs drew
    names = ("alpha", "beta", "length", "max_pending", "seed")
    return {name: getattr(policy, name) for name in names}, {}


def _build_thompson(parts: PolicyParts) -> ThompsonDraft:
    return ThompsonDraft(_one_exit(parts), **parts.params)


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


def _describe_router(policy: DraftRouter) -> tuple[Params, Tensors]:
    tensors = pack_layers(policy.starter.weights, "starter")
    return {"max_pending": policy.max_pending}, tensors | pack_layers(
        policy.router.weights, "router"
    )


def _build_router(parts: PolicyParts) -> DraftRouter:
    nets = (unpacked(parts.tensors, "starter"), unpacked(parts.tensors, "router"))
    pending = parts.params["max_pending"]
    return DraftRouter(parts.exits, *nets, max_pending=pending, candidates_VK=parts.candidates_VK)


def _clear_router(
    policy: DraftRouter, features_NF: FloatArray, outlook_NC: FloatArray
) -> BoolArray:
    everywhere = range(len(policy.exits))
    routed = [policy.route_logits(here, features_NF, outlook_NC) for here in everywhere]
    ordered_PNA = np.sort([policy.start_logits(outlook_NC), *routed], axis=-1)
    lead_PN = ordered_PNA[:, :, -1] - ordered_PNA[:, :, -2]
    return np.asarray((lead_PN > CLOSE_LOGIT).all(0))


DRAFT_KINDS = (
    Kind(
        name="draft-static",
        type=StaticDraft,
        params={"length": COUNT, "max_pending": COUNT},
        describe=_describe_static,
        build=_build_static,
    ),
    Kind(
        name="draft-confident",
        type=ConfidentDraft,
        params={"length": COUNT, "max_pending": COUNT, "threshold": NUMBER},
        describe=_describe_confident,
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
        describe=_describe_router,
        build=_build_router,
        clear=_clear_router,
    ),
)
"""To be named in ``controller.kinds``."""
