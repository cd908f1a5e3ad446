"""A trained jumping actor as a numpy router, its normaliser and preference folded in.

Shape suffixes: F features, C columns of outlook, D = F (+ C) + 1 observation columns, H hidden
units, A = jumps + 1 actions.
"""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from offramp.agents.learning.actor import NEVER, JumpActor
from offramp.agents.learning.export import Normaliser, Weights, linear_weights
from offramp.controller.features import OUTLOOK_V1, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.router import MlpRouter

Layer = tuple[FloatArray, FloatArray]


def router_of(
    actor: JumpActor,
    normaliser: Normaliser,
    preference: float,
    exits: tuple[int, ...],
    schema: FeatureSchema,
    candidates_VK: IntArray | None = None,
) -> MlpRouter:
    """The router whose every decision is SB3's deterministic choice at one preference.

    The observation is [features, log λ], or [features, outlook, log λ] after an on-policy phase;
    without an outlook its rows are zeros, and the first exit is a constant.

    Args:
        actor: What was trained.
        normaliser: Normalises the observation columns.
        preference: λ, which becomes a constant of the first layer.
        exits: Layers to ask after.
        schema: The features read.
        candidates_VK: Candidate table for the probe.

    Raises:
        RequestError: the actor's jumps do not fit the exits.
    """
    first, *hidden, last = folded_layers(actor, normaliser)
    weight_DH, bias_H = first
    bias_H = bias_H + np.float32(math.log(preference)) * weight_DH[-1]
    features_FH, outlook_CH = _split(weight_DH[:-1], schema.width)
    weight_HA, bias_A = last
    reach = min(bias_A.size - 1, len(exits))  # from an exit, no jump is longer
    routing = [
        (np.concatenate([features_FH, outlook_CH]), bias_H),
        *hidden,
        (weight_HA[:, : reach + 1].copy(), bias_A[: reach + 1].copy()),
    ]
    starting = [(outlook_CH, bias_H), *hidden, start_layer(weight_HA, bias_A, len(exits))]
    router = MlpRouter(exits, schema, routing, first=starting, candidates_VK=candidates_VK)
    if outlook_CH.any():
        return router
    constant = int(router.start(np.zeros((1, OUTLOOK_V1.width), np.float32))[0])
    return MlpRouter(exits, schema, routing, first=constant, candidates_VK=candidates_VK)


def folded_layers(actor: JumpActor, normaliser: Normaliser) -> Weights:
    """The actor's layers on raw observations."""
    hidden = [m for m in actor.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
    first, *rest = [linear_weights(layer) for layer in (*hidden, actor.action_net)]
    return [normaliser.fold(*first), *rest]


def _split(weight_DH: FloatArray, features: int) -> tuple[FloatArray, FloatArray]:
    outlook_CH = weight_DH[features:]
    if not len(outlook_CH):
        outlook_CH = np.zeros((OUTLOOK_V1.width, weight_DH.shape[1]), np.float32)
    return weight_DH[:features], np.ascontiguousarray(outlook_CH)


def start_layer(weight_HA: FloatArray, bias_A: FloatArray, exits: int) -> Layer:
    """Make the output layer of the first decision: action k is exit k − 1, the end comes last."""
    weight, bias = weight_HA[:, 1:].copy(), bias_A[1:].copy()
    if bias.size > exits:
        return weight, bias
    never = np.zeros((len(weight), 1), np.float32), np.float32(NEVER)
    return np.concatenate([weight, never[0]], axis=1), np.append(bias, never[1])
