"""From a trained drafter to the router that the engine runs.

Shape suffixes: D observation columns, H hidden units.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from offramp.agents.drafting.net import DraftNets
from offramp.agents.export import linear_weights
from offramp.controller.drafts.router import DraftRouter
from offramp.controller.net import Weights


def router_of(model: Any, exits: tuple[int, ...], max_pending: int) -> DraftRouter:
    """The actor's two nets as a policy; what they were not shown in training has weight 0.

    Args:
        model: A ``PPO`` that ``train_drafter`` built.
        exits: Those of its traces.
        max_pending: Of its training.
    """
    nets: DraftNets = model.policy.mlp_extractor
    uses_D = nets.uses_D.numpy()
    starter = _weights(nets.starter, uses_D[nets.features : -1])
    router = _weights(nets.router, uses_D[:-1])
    return DraftRouter(exits, starter, router, max_pending=max_pending)


def _weights(net: nn.Sequential, uses_I: np.ndarray) -> Weights:
    layers = [linear_weights(layer) for layer in net if isinstance(layer, nn.Linear)]
    weight, bias = layers[0]
    return [(np.ascontiguousarray(weight * uses_I[:, None]), bias), *layers[1:]]
