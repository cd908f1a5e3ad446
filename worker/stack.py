"""A causal LM as a stack of layers, driven one by one.

Shape suffixes: B rows, T tokens, D width, N rows of any origin, K candidates, V vocabulary,
H rotary width (head_dim).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offramp.controller.errors import ModelError

Rotary = tuple[Tensor, ...]
"""Cosines and sines, each [B, T, H]."""


class KVUpdate(Protocol):
    """The one method that Hugging Face attention asks of a cache."""

    def update(
        self, keys: Tensor, values: Tensor, layer: int, /, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that the rows may attend to."""
        ...


class LayerStack(Protocol):
    """What the decode loop needs of a model. Layers are counted from 1 in exits, 0 in indices."""

    layers: int
    width: int
    vocab: int
    context: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    eos_tokens: frozenset[int]
    heads_per_key: int

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Embeddings, [B, T, D]."""
        ...

    def rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines of the positions, computed once per step."""
        ...

    def run_layer(
        self, index: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """One decoder layer, [B, T, D]."""
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


class KVWeights:
    """One layer's key/value projection, for the fused fill.

    Attributes:
        norm_D: Weight of the layer's input RMS norm.
        eps: That norm's epsilon.
        key, value: The projections.
        key_norm: Per-head RMS norm of the keys (Qwen3), or None.
    """

    def __init__(
        self, norm: nn.Module, key: nn.Linear, value: nn.Linear, key_norm: nn.Module | None
    ) -> None:
        self.norm_D: Tensor = norm.weight  # type: ignore[assignment]  # nn.Module attributes are untyped
        self.eps = float(norm.variance_epsilon)  # type: ignore[arg-type]  # as above
        self.key = key
        self.value = value
        self.key_norm = key_norm


class HFDecoderStack:
    """Unmodified Hugging Face decoder layers of the Llama, Mistral, Qwen2 and Qwen3 family.

    Args:
        model: A ``*ForCausalLM`` in evaluation mode.

    Raises:
        ModelError: an attention pattern that one mask for all layers cannot serve.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        require_servable(config)
        self.model = model
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.vocab = int(config.vocab_size)
        self.context = int(config.max_position_embeddings)
        self.kv_heads = int(config.num_key_value_heads)
        self.heads_per_key = int(config.num_attention_heads) // self.kv_heads
        self.head_dim = int(model.model.layers[0].self_attn.head_dim)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.eos_tokens = _eos_tokens(model)
        self.blocks = list(model.model.layers)
        self._embed = model.model.embed_tokens
        self._norm = model.model.norm
        self._rotary = model.model.rotary_emb
        self.head = model.lm_head
        self.head_weight_VD: Tensor = model.lm_head.weight

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Embeddings, [B, T, D]."""
        return self._embed(tokens_BT)  # type: ignore[no-any-return]

    def rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines of the positions."""
        return self._rotary(x_BTD, positions_BT)  # type: ignore[no-any-return]

    def run_layer(
        self, index: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """One decoder layer, [B, T, D]."""
        return self.blocks[index](  # type: ignore[no-any-return]
            x_BTD, attention_mask=mask, past_key_values=kv, position_embeddings=rotary
        )

    def norm(self, x_ND: Tensor) -> Tensor:
        """The final norm, [N, D]."""
        return self._norm(x_ND)  # type: ignore[no-any-return]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Final norm and whole LM head, [N, V]."""
        return self.head(self._norm(x_ND))  # type: ignore[no-any-return]

    def head_rows(self, tokens_NK: Tensor) -> Tensor:
        """Rows of the LM head, [N, K, D]."""
        return nn.functional.embedding(tokens_NK, self.head_weight_VD)

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self.blocks[index]
        attention = block.self_attn
        return KVWeights(
            block.input_layernorm,
            attention.k_proj,
            attention.v_proj,
            getattr(attention, "k_norm", None),
        )


def _eos_tokens(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def require_servable(config: Any) -> None:
    """Refuse what one mask and one set of angles for all rows cannot serve.

    Args:
        config: The model's configuration.

    Raises:
        ModelError: sliding-window attention, or rotary embeddings that depend on the length.
    """
    _refuse_sliding_window(config)
    _refuse_dynamic_rope(config)


def _refuse_sliding_window(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = window is not None if kinds is None else "sliding_attention" in kinds
    if slides and window < config.max_position_embeddings:
        raise ModelError(
            "model",
            f"uses sliding-window attention over {window} tokens, which is not supported yet",
            "Use a model with full attention, or set sliding_window to null in config.json",
        )


def _refuse_dynamic_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelError(
            "model",
            f"uses {kind!r} rotary embeddings, whose angles depend on the batch's longest row",
            "Use a model with default, linear, llama3 or yarn rotary embeddings",
        )
