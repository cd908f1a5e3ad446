"""From trained nets to plain weights that the controller's numpy policies run.

A net's feature normalisation is fitted on training traces and folded into its first layer.

Shape suffixes: N rows, F features, H hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from offramp.controller.features import FloatArray

Weights = list[tuple[FloatArray, FloatArray]]
"""One (weight [in, out], bias [out]) pair per layer, float32."""

SMALLEST_STD = 1e-3
"""Columns that hardly vary are centred, not blown up."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Column means and standard deviations, each [F] float32."""

    mean_F: FloatArray
    std_F: FloatArray

    @classmethod
    def fit(cls, rows_NF: FloatArray) -> Normaliser:
        """Means and deviations of some rows."""
        rows64 = rows_NF.astype(np.float64)
        std_F = np.maximum(rows64.std(0), SMALLEST_STD)
        return cls(rows64.mean(0).astype(np.float32), std_F.astype(np.float32))

    def fold(self, weight_FH: FloatArray, bias_H: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The layer that takes raw features: w/σ and b − (μ/σ)·w, computed in float64."""
        scaled_FH = weight_FH.astype(np.float64) / self.std_F[:, None]
        shifted_H = bias_H - self.mean_F.astype(np.float64) @ scaled_FH
        return scaled_FH.astype(np.float32), shifted_H.astype(np.float32)


def linear_weights(layer: nn.Linear) -> tuple[FloatArray, FloatArray]:
    """Weight [in, out] and bias [out] of a linear layer, copied."""
    weight = layer.weight.detach().numpy().T.copy()
    return weight, layer.bias.detach().numpy().copy()


def ppo_weights(model: Any, normaliser: Normaliser, preference: float) -> Weights:
    """A PPO actor as an MLP on raw features whose output is logit(leave) − logit(go on).

    The normaliser is folded into the first layer, and so is the preference: log λ is a constant
    of the published policy, not an input. Output > 0 is SB3's deterministic choice to leave.

    Args:
        model: A ``stable_baselines3.PPO`` that ``train_ppo`` built.
        normaliser: Normalises the F + 1 observation columns, the last being log λ.
        preference: λ to fix.
    """
    hidden = [m for m in model.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
    first, *rest = [linear_weights(layer) for layer in hidden]
    weight_FH, bias_H = normaliser.fold(*first)
    bias_H = bias_H + np.float32(math.log(preference)) * weight_FH[-1]
    action_weight, action_bias = linear_weights(model.policy.action_net)
    leave = (
        np.ascontiguousarray(action_weight[:, 1:] - action_weight[:, :1]),
        action_bias[1:] - action_bias[:1],
    )
    return [(np.ascontiguousarray(weight_FH[:-1]), bias_H), *rest, leave]
