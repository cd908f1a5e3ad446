"""A drafter's actor, of one net before the first layer and one at the exits, and its export.

Shape suffixes: B rows, D observation columns, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from offramp.agents.learning.export import linear_weights
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2, FloatArray, IntArray
from offramp.controller.policies.drafts.draft_router import DraftRouter
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.router import targets

UNSEEN = frozenset({"position", "step", "left", "active", "waiting"})
"""Columns the nets are not shown: constant in training, or telling only where a window ends."""

NEVER = -1e9
"""Logit of an action that would jump beyond the end."""


class DraftNets(nn.Module):
    """Logits of all actions, and the critic's hidden layer.

    ``starter`` reads outlook, odds (0 there) and trust, ``router`` the features as well; which of
    them speaks is the observation's last column. So each is exported as it is.

    Args:
        columns: D; the last is the place.
        exits: E; there are E + 1 actions.
        hidden: Units of each hidden layer.
    """

    uses_D: Tensor
    mask_PA: Tensor

    def __init__(self, columns: int, exits: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.features, self.exits = SOFTMAX_V2.width, exits
        self.latent_dim_pi = exits + 1
        self.latent_dim_vf = 64
        self.starter = tanh_net(columns - self.features - 1, [*hidden, exits + 1])
        self.router = tanh_net(columns - 1, [*hidden, exits + 1])
        self.critic = nn.Sequential(
            nn.Linear(columns, 64), nn.Tanh(), nn.Linear(64, self.latent_dim_vf), nn.Tanh()
        )
        shown = [name not in UNSEEN for name in (*SOFTMAX_V2.columns, *OUTLOOK_V1.columns)]
        self.register_buffer(
            "uses_D", torch.tensor([*shown, True, True, True], dtype=torch.float32)
        )
        # From each exit, then one row for the start, where every action is valid.
        valid = torch.from_numpy(targets(exits, exits - 1, ends=True) >= 0)
        valid = torch.cat([torch.ones(1, exits + 1, dtype=torch.bool), valid])
        self.register_buffer("mask_PA", torch.where(valid, 0.0, NEVER))

    def forward(self, obs_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the critic's latent."""
        return self.forward_actor(obs_BD), self.forward_critic(obs_BD)

    def forward_actor(self, obs_BD: Tensor) -> Tensor:
        """Compute the logits of all actions, [B, A]."""
        place_B = (obs_BD[:, -1] * self.exits).round().long()
        seen_BD = obs_BD * self.uses_D
        start_BA = self.starter(seen_BD[:, self.features : -1])
        route_BA = self.router(seen_BD[:, :-1])
        logits_BA = torch.where((place_B == 0)[:, None], start_BA, route_BA)
        return logits_BA + self.mask_PA[place_B]

    def forward_critic(self, obs_BD: Tensor) -> Tensor:
        """Compute the critic's hidden layer."""
        latent: Tensor = self.critic(obs_BD * self.uses_D)
        return latent


class DraftPolicy(ActorCriticPolicy):  # type: ignore[misc]  # mypy skips stable_baselines3
    """SB3's actor-critic with ``DraftNets``, whose actor already ends in logits."""

    def __init__(self, *args: Any, nets: dict[str, Any], **kwargs: Any) -> None:
        self._nets = nets
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = DraftNets(self.features_dim, **self._nets)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()
        for net in (self.mlp_extractor.starter, self.mlp_extractor.router):
            last = net[-1]
            assert isinstance(last, nn.Linear)
            nn.init.orthogonal_(last.weight, gain=0.01)
        self.optimizer = self.optimizer_class(
            self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs
        )


def tanh_net(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers[:-1])


def router_of(
    model: Any,
    chances: DraftChances,
    exits: tuple[int, ...],
    max_pending: int,
    candidates_VK: IntArray | None = None,
) -> DraftRouter:
    """The actor's two nets as a policy; what they were not shown in training has weight 0.

    Args:
        model: A ``PPO`` that ``train_drafter`` built.
        chances: What its odds and trust were of.
        exits: Exits of the traces that it was trained on.
        max_pending: Most drafts that were open in its training.
        candidates_VK: The table of its traces if it was trained on ``CandidateDrafts``. The other
            columns of CANDIDATES_V1 get weight 0.
    """
    nets: DraftNets = model.policy.mlp_extractor
    uses_D = nets.uses_D.numpy()
    starter = _weights(nets.starter, uses_D[nets.features : -1])
    router = _weights(nets.router, uses_D[:-1])
    if candidates_VK is not None:
        weight, bias = router[0]
        router[0] = (_spread(weight), bias)
    return DraftRouter(
        exits,
        starter,
        router,
        max_pending=max_pending,
        candidates_VK=candidates_VK,
        chances=chances,
    )


def _spread(weight_IH: FloatArray) -> FloatArray:
    """Rows of SOFTMAX_V2's columns at their places among those of CANDIDATES_V1."""
    own = [CANDIDATES_V1.index(name) for name in SOFTMAX_V2.columns]
    extra = CANDIDATES_V1.width - SOFTMAX_V2.width
    out_IH = np.zeros((len(weight_IH) + extra, weight_IH.shape[1]), np.float32)
    out_IH[own] = weight_IH[: SOFTMAX_V2.width]
    out_IH[CANDIDATES_V1.width :] = weight_IH[SOFTMAX_V2.width :]
    return out_IH


def _weights(net: nn.Sequential, uses_I: np.ndarray) -> list[tuple[FloatArray, FloatArray]]:
    layers = [linear_weights(layer) for layer in net if isinstance(layer, nn.Linear)]
    weight, bias = layers[0]
    return [(np.ascontiguousarray(weight * uses_I[:, None]), bias), *layers[1:]]
