"""From a trained drafter to the router that the engine runs.

Shape suffixes: D observation columns, I inputs, H hidden units, V vocabulary, K candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from offramp.agents.drafting.draft_net import DraftNets
from offramp.agents.learning.export import linear_weights
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, FloatArray, IntArray
from offramp.controller.policies.drafts.draft_router import DraftRouter


def router_of(
    model: Any,
    exits: tuple[int, ...],
    max_pending: int,
    candidates_VK: IntArray | None = None,
) -> DraftRouter:
    """The actor's two nets as a policy; what they were not shown in training has weight 0.

    Args:
        model: A ``PPO`` that ``train_drafter`` built.
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
    return DraftRouter(exits, starter, router, max_pending=max_pending, candidates_VK=candidates_VK)


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
