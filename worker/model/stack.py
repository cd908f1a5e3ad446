"""A causal LM as a stack of layers, driven one by one: what an adapter of a family offers.

Shape suffixes: B rows, T tokens, D width, N rows of any origin, K candidates, V vocabulary,
H head_dim, G key/value heads, R = 2·G·H rows of stacked key and value projections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, ...]
"""Cosines and sines, each [B, T, rotated part of H]; empty for a family without rotary embeddings.

Every part has the rows first, so that callers may index rows without knowing what they hold."""


class KVUpdate(Protocol):
    """The one method that Hugging Face attention asks of a cache."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int, /, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that the rows may attend to."""
        ...


RunCompiled = Callable[[int, int, Tensor, Rotary, Any, Any], Tensor | None]
"""Takes what ``LayerStack.run_layers`` takes."""


class LayerStack(Protocol):
    """What the decode loop needs of a model. Layers are counted from 1 in exits, 0 in indices.

    Attributes:
        layers: Number of decoder layers.
        width: Size of a hidden state.
        vocab: Number of tokens.
        context: Positions that the model knows.
        kv_heads, head_dim: Shape of one position's keys in one layer.
        heads_per_key: Query heads that share one key/value head.
        dtype, device: Dtype and device of the weights.
        eos_tokens: Tokens that end a completion; may be empty.
        blocks: The layers that ``run_layer`` calls, the model's first, then those of adapters;
            equivalents may take their places.
        last_layer: The model's last layer as it was loaded, from which adapter layers are made.
        run_compiled: Runs neighbouring layers in one call, or gives None; None: nothing does.
        final_norm: The norm that ``norm`` calls; an equivalent may take its place.
        head: The LM head that ``logits`` calls; an equivalent may take its place.
        head_weight_VD: The head's weight as it was loaded, whatever ``head`` is now.
    """

    layers: int
    width: int
    vocab: int
    context: int
    kv_heads: int
    head_dim: int
    heads_per_key: int
    dtype: torch.dtype
    device: torch.device
    eos_tokens: frozenset[int]
    blocks: list[nn.Module]
    last_layer: nn.Module
    run_compiled: RunCompiled | None
    final_norm: nn.Module
    head: nn.Module
    head_weight_VD: Tensor

    def adopt(self, blocks: list[nn.Module]) -> None:
        """Run these layers from now on, and read keys' and values' weights off them, too."""
        ...

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """What enters the first layer, [B, T, D]."""
        ...

    @property
    def angle_tables(self) -> tuple[Tensor, ...]:
        """Cosines and sines of all positions, each [C, turned part of H]; () if none are kept."""
        ...

    def rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines of the positions, computed once per step."""
        ...

    def run_layer(
        self, index: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """One decoder layer, [B, T, D]. The mask goes to the attention function as it is."""
        ...

    def run_layers(
        self, first: int, last: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """The decoder layers from ``first`` on, without ``last``, [B, T, D]."""
        ...

    def norm(self, x_ND: Tensor) -> Tensor:
        """The final norm, [N, D]."""
        ...

    def logits(self, x_ND: Tensor) -> Tensor:
        """Final norm and whole LM head, [N, V]."""
        ...

    def head_rows(self, tokens_NK: Tensor) -> Tensor:
        """Rows of the LM head for some tokens, [N, K, D]."""
        ...

    def kv_weights(self, index: int) -> KVWeights:
        """What turns a hidden state into one layer's keys and values."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KVWeights:
    """One layer's way from a hidden state to keys and values, for the fused fill."""

    norm: Literal["rms", "layer"]
    """The norm before the projections: over the root mean square, or LayerNorm."""
    scale_D: Tensor
    """What that norm multiplies by."""
    shift_D: Tensor | None
    """What that norm adds; None: nothing."""
    eps: float
    """That norm's epsilon."""
    weight_RD: Tensor
    """The key projection's rows, head by head, then the value projection's."""
    bias_R: Tensor | None
    """Their biases; None: there are none."""
    key_norm_H: Tensor | None = None
    """Weight of an RMS norm over each key (Qwen3), or None."""
    key_norm_eps: float = 0.0
    """That norm's epsilon."""
    rotates: bool = True
    """Whether the keys are rotated by position."""


def cloned(module: nn.Module, replaced: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Copy a module and what it is made of, but not parameters and hooks: these are shared.

    Args:
        module: Stays as it was.
        replaced: Gives what stands in for a part; None: a clone.
    """
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else replaced(child) or cloned(child, replaced)
        for name, child in module._modules.items()
    }
    return twin
