"""SB3's actor-critic with masks and fixed normalisation, and its export to a numpy router.

Shape suffixes: N rows, D observation columns, A actions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from offramp.agents.learning.export import Normaliser, Weights, linear_weights
from offramp.controller.features import OUTLOOK_V1, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.router import MlpRouter

NEVER = -1e8
"""Logit of an invalid action: finite, so that entropies stay so."""

PI, VF = [32, 32], [64, 64]
"""Hidden units of actor and critic: about 1.9k and 5k parameters."""


class Normalised(BaseFeaturesExtractor):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Fixed normalisation inside the policy, so that export can fold it (no VecNormalize)."""

    def __init__(self, space: Box, normaliser: Normaliser) -> None:
        super().__init__(space, features_dim=int(space.shape[0]))
        self.register_buffer("mean", torch.from_numpy(normaliser.mean_F))
        self.register_buffer("std", torch.from_numpy(normaliser.std_F))

    def forward(self, observations: Tensor) -> Tensor:
        """(observation − mean) / deviation."""
        return (observations - self.mean) / self.std  # type: ignore[no-any-return]


class JumpActor(ActorCriticPolicy):  # type: ignore[misc]  # mypy skips stable_baselines3
    """An actor that jumps: where a row stands is read off its depth, and with it the mask.

    SB3's own PPO knows no masks. Without them an exported router, which masks, would decide other
    than the policy it came from.

    Args:
        args: Passed on to ``ActorCriticPolicy``.
        depth_column: Index of the observation column that holds layer / number of layers, 0 before
            the first.
        depths: That of each exit, ascending.
        invalid_SA: Row s + 1 says which actions are invalid at exit s, row 0 before the first
            layer.
        kwargs: Passed on to ``ActorCriticPolicy``.
    """

    def __init__(
        self,
        *args: Any,
        depth_column: int,
        depths: tuple[float, ...],
        invalid_SA: tuple[tuple[bool, ...], ...],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.depth_column = depth_column
        middles = np.asarray(depths) - np.diff([0, *depths]) / 2
        self.register_buffer("_edges", torch.tensor(middles, dtype=torch.float32))
        self.register_buffer("_invalid_SA", torch.tensor(invalid_SA))

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, values and log-probabilities, as SB3's."""
        values, distribution = self._both(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, log-probabilities and entropies, as SB3's."""
        values, distribution = self._both(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Tensor) -> CategoricalDistribution:
        """Over the valid actions."""
        return CategoricalDistribution(self.action_space.n).proba_distribution(self.logits(obs))

    def logits(self, obs: Tensor) -> Tensor:
        """Masked logits, [N, A]."""
        latent = self.mlp_extractor.forward_actor(self.extract_features(obs))
        return self._masked(self.action_net(latent), obs)

    def _both(self, obs: Tensor) -> tuple[Tensor, CategoricalDistribution]:
        latent_pi, latent_vf = self.mlp_extractor(self.extract_features(obs))
        logits = self._masked(self.action_net(latent_pi), obs)
        distribution = CategoricalDistribution(self.action_space.n).proba_distribution(logits)
        return self.value_net(latent_vf), distribution

    def _masked(self, logits_NA: Tensor, obs_ND: Tensor) -> Tensor:
        place_N = torch.bucketize(obs_ND[:, self.depth_column].contiguous(), self._edges)
        return logits_NA.masked_fill(self._invalid_SA[place_N], NEVER)


def actor_options(
    normaliser: Normaliser,
    depth_column: int,
    exits: tuple[int, ...],
    layers: int,
    invalid_SA: np.ndarray,
) -> dict[str, Any]:
    """``policy_kwargs`` of a ``JumpActor``.

    Args:
        normaliser: Normalises the observation.
        depth_column: Index of the depth's column, as for ``JumpActor``.
        exits: Layers that it may ask after.
        layers: Number of layers.
        invalid_SA: Actions that lead nowhere, as for ``JumpActor``.
    """
    return {
        "net_arch": {"pi": PI, "vf": VF},
        "activation_fn": nn.Tanh,
        "features_extractor_class": Normalised,
        "features_extractor_kwargs": {"normaliser": normaliser},
        "depth_column": depth_column,
        "depths": tuple(layer / layers for layer in exits),
        "invalid_SA": tuple(map(tuple, invalid_SA.tolist())),
    }


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
