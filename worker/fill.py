"""Keys and values of skipped layers from an exit state: one GEMM for all remaining layers.

Shape suffixes: N rows, L layers filled, D width, G key/value heads, H head_dim,
R = L·2·G·H stacked output rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.worker.stack import KVWeights, LayerStack, Rotary


class KVProjector:
    """The ``project`` mode of the cache: what each skipped layer would have stored, had the
    hidden state reached it unchanged (Schuster et al. 2022, CALM, section 3.2, state propagation).

    Every layer's input norm shares one root mean square, so its weight is folded into the
    stacked key and value matrices.
    """

    def __init__(self, stack: LayerStack) -> None:
        weights = [stack.kv_weights(index) for index in range(stack.layers)]
        self.heads = stack.kv_heads
        self.head_dim = stack.head_dim
        self.eps = weights[0].eps
        self.rows = 2 * stack.kv_heads * stack.head_dim
        self.weight_RD = torch.cat([_folded(w) for w in weights]).to(stack.dtype)
        self.bias_R = _stacked_bias(weights, stack.dtype)
        self.key_norm_LH, self.key_norm_eps = _stacked_key_norm(weights)

    def project(self, x_ND: Tensor, first_layer: int, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values for the layers from ``first_layer`` (index) on.

        Args:
            x_ND: Exit states.
            first_layer: Index of the first layer not executed.
            rotary: Cosines and sines of the rows' positions, each [N, 1, H].

        Returns:
            Keys (rotated) and values, each [N, L, G, H].
        """
        start = first_layer * self.rows
        x32 = x_ND.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        unit_ND = (x32 * scale).to(x_ND.dtype)
        bias_R = None if self.bias_R is None else self.bias_R[start:]
        out = nn.functional.linear(unit_ND, self.weight_RD[start:], bias_R)
        keys, values = out.view(len(x_ND), -1, 2, self.heads, self.head_dim).unbind(2)
        if self.key_norm_LH is not None:
            keys = _rms(keys, self.key_norm_eps) * self.key_norm_LH[first_layer:, None]
        return _rotate(keys, rotary), values


def _folded(weights: KVWeights) -> Tensor:
    stacked = torch.cat([weights.key.weight, weights.value.weight]).float()
    return stacked * weights.norm_D.float()


def _stacked_bias(weights: list[KVWeights], dtype: torch.dtype) -> Tensor | None:
    # nn.Linear declares its bias a Tensor, though Linear(bias=False) has none.
    if getattr(weights[0].key, "bias", None) is None:
        return None
    return torch.cat([torch.cat([w.key.bias, w.value.bias]) for w in weights]).to(dtype)


def _stacked_key_norm(weights: list[KVWeights]) -> tuple[Tensor | None, float]:
    norms: list[Any] = [w.key_norm for w in weights if w.key_norm is not None]
    if not norms:
        return None, 0.0
    return torch.stack([norm.weight for norm in norms]), float(norms[0].variance_epsilon)


def _rms(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(keys_NLGH: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (part[:, :, None] for part in rotary)
    left, right = keys_NLGH.chunk(2, dim=-1)
    return keys_NLGH * cos + torch.cat((-right, left), dim=-1) * sin
