"""Layers' key and value projections with what stands in front of them folded in.

Shape suffixes: D width, L layers, H head_dim, R rows of one layer's keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.controller.errors import ModelError
from offramp.worker.model.stack import KVWeights


def require_one_norm(weights: list[KVWeights]) -> None:
    """Refuse layers whose norms differ in kind or epsilon: ModelError."""
    kinds = {(w.norm, w.eps) for w in weights}
    key_kinds = {("no norm" if w.key_norm_H is None else "rms", w.key_norm_eps) for w in weights}
    for what, found in (("input", kinds), ("key", key_kinds)):
        if len(found) > 1:
            names = " and ".join(f"{name} ({eps:g})" for name, eps in sorted(found))
            raise ModelError(
                "model",
                f"has {what} norms whose kind or epsilon differs between layers: {names}",
                "Use a model whose layers share one kind of norm and one epsilon",
            )


def folded(weights: KVWeights) -> Tensor:
    """A layer's key and value matrix [R, D], its norm's weight folded in."""
    return weights.weight_RD.float() * weights.scale_D.float()


def stacked_bias(weights: list[KVWeights], dtype: torch.dtype) -> Tensor | None:
    """What all layers add, one after the other; None: nothing."""
    if all(w.bias_R is None and w.shift_D is None for w in weights):
        return None
    return torch.cat([folded_bias(w) for w in weights]).to(dtype)


def folded_bias(weights: KVWeights) -> Tensor:
    """What a layer adds to its keys and values [R], its norm's shift folded in."""
    bias_R = weights.weight_RD.new_zeros(len(weights.weight_RD), dtype=torch.float32)
    if weights.bias_R is not None:
        bias_R = bias_R + weights.bias_R.float()
    if weights.shift_D is not None:
        bias_R = bias_R + weights.weight_RD.float() @ weights.shift_D.float()
    return bias_R


def stacked_key_norm(weights: list[KVWeights]) -> Tensor | None:
    """Weights of the layers' key norms [L, H]; None: there are none."""
    norms = [w.key_norm_H for w in weights if w.key_norm_H is not None]
    return torch.stack(norms).to(weights[0].weight_RD.dtype) if norms else None
