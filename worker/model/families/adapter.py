"""What the adapters of all families share: where a model's parts lie, and what none can serve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp.controller.errors import ModelError
from offramp.worker.model.stack import KVUpdate, KVWeights, Rotary, RunCompiled

TABLE_BYTES = 64 * 1024 * 1024
"""A larger table is not kept; then each step asks the model's module."""


class Angles:
    """Rotary embeddings whose angles depend on the position alone.

    In a decode step two lookups take a tenth of the time of the module's dozen operations.

    Args:
        module: Hugging Face's rotary embedding; None for a family without.
        context: Most tokens of a sequence C.
        dtype, device: Dtype and device of the model.

    Attributes:
        tables: Cosines and sines of all positions [C, H]; none where they would be too large.
    """

    def __init__(self, module: Any, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self._module = module
        self.tables: list[Tensor] = []
        if module is None:
            return
        like = torch.empty(1, dtype=dtype, device=device)
        sample = module(like, torch.zeros((1, 1), dtype=torch.long, device=device))
        if 2 * context * sample[0].nbytes <= TABLE_BYTES:
            positions_1C = torch.arange(context, device=device)[None]
            self.tables = [part[0].contiguous() for part in module(like, positions_1C)]

    def at(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines [B, T, H]; empty for a family without rotary embeddings."""
        if self.tables:
            return tuple(torch.embedding(table, positions_BT) for table in self.tables)
        return () if self._module is None else tuple(self._module(x_BTD, positions_BT))


STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""


class HFStack:
    """Unmodified Hugging Face decoder layers, driven one by one.

    A family says in class attributes where its parts lie, each a dotted path inside the model,
    overrides the methods in which it differs from Llama, and implements ``kv_weights``.

    Args:
        model: A causal LM of the family in evaluation mode.

    Raises:
        ModelError: a variant of the family that is not supported.
    """

    blocks_path: ClassVar[str] = "model.layers"
    embed_path: ClassVar[str] = "model.embed_tokens"
    norm_path: ClassVar[str] = "model.norm"
    rotary_path: ClassVar[str] = "model.rotary_emb"
    """Empty for a family without rotary embeddings."""
    cache_name: ClassVar[str] = "past_key_values"
    """What a layer calls the cache."""
    shares_kv_heads: ClassVar[bool] = True
    """Whether the configuration gives key/value heads and head_dim of their own. The older
    families have as many as query heads, and ignore a stray entry."""
    window_everywhere: ClassVar[bool] = False
    """Whether a sliding window holds in every layer, whatever ``layer_types`` says."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.require_servable(config)
        heads = int(config.num_attention_heads)
        self.model = model
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.vocab = int(config.vocab_size)
        self.context = int(config.max_position_embeddings)
        self.kv_heads, self.head_dim = heads, self.width // heads
        if self.shares_kv_heads:
            self.kv_heads = int(config.num_key_value_heads)
            self.head_dim = int(getattr(config, "head_dim", None) or self.head_dim)
        self.heads_per_key = heads // self.kv_heads
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.eos_tokens = _eos_tokens(model)
        # Two lists: ``blocks`` may be replaced, the fill keeps reading the model's own weights.
        self._layers: tuple[Any, ...] = tuple(model.get_submodule(self.blocks_path))
        self.blocks: list[nn.Module] = list(self._layers)
        self.last_layer: nn.Module = self._layers[-1]
        self.run_compiled: RunCompiled | None = None
        self.head: nn.Module = model.lm_head
        self.head_weight_VD: Tensor = model.lm_head.weight
        self._embed = model.get_submodule(self.embed_path)
        self.final_norm: nn.Module = model.get_submodule(self.norm_path)
        rotary = model.get_submodule(self.rotary_path) if self.rotary_path else None
        self._angles = Angles(rotary, self.context, self.dtype, self.device)

    @classmethod
    def require_servable(cls, config: Any) -> None:
        """Refuse a variant of the family that would not be decoded exactly.

        Args:
            config: The model's configuration.

        Raises:
            ModelError: quantised weights, sliding-window attention, rotary embeddings that depend
                on the length, or what the family itself refuses.
        """
        _refuse_quantised(config)
        _refuse_sliding_window(config, cls.window_everywhere)
        _refuse_dynamic_rope(config)

    def adopt(self, blocks: list[nn.Module]) -> None:
        """Run these layers from now on, and read keys' and values' weights off them, too."""
        self.blocks = blocks
        self._layers = tuple(blocks)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Token embeddings, [B, T, D]."""
        return self._embed(tokens_BT)  # type: ignore[no-any-return]

    @property
    def angle_tables(self) -> tuple[Tensor, ...]:
        """Cosines and sines of all positions, each [C, turned part of H]; () if none are kept."""
        return tuple(self._angles.tables)

    def rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines of the positions; empty for a family without rotary embeddings."""
        return self._angles.at(x_BTD, positions_BT)

    def run_layer(
        self, index: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """One decoder layer, [B, T, D]."""
        given: dict[str, Any] = {"attention_mask": mask, self.cache_name: kv}
        if rotary:
            given["position_embeddings"] = rotary
        return self.blocks[index](x_BTD, **given)  # type: ignore[no-any-return]

    def run_layers(
        self, first: int, last: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: KVUpdate | None
    ) -> Tensor:
        """The decoder layers from ``first`` on, without ``last``, [B, T, D]."""
        if self.run_compiled is not None:
            out_BTD = self.run_compiled(first, last, x_BTD, rotary, mask, kv)
            if out_BTD is not None:
                return out_BTD
        for index in range(first, last):
            x_BTD = self.run_layer(index, x_BTD, rotary, mask, kv)
        return x_BTD

    def norm(self, x_ND: Tensor) -> Tensor:
        """The final norm, [N, D]."""
        return self.final_norm(x_ND)  # type: ignore[no-any-return]

    def logits(self, x_ND: Tensor) -> Tensor:
        """Final norm and whole LM head, [N, V]."""
        return self.head(self.norm(x_ND))  # type: ignore[no-any-return]

    def head_rows(self, tokens_NK: Tensor) -> Tensor:
        """Rows of the LM head, [N, K, D]."""
        return nn.functional.embedding(tokens_NK, self.head_weight_VD)

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        raise NotImplementedError


def stacked(projections: Iterable[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of linear layers, one above the other; None if they have no bias."""
    layers = list(projections)
    # nn.Linear declares its bias a Tensor, though Linear(bias=False) has none.
    biases = [getattr(layer, "bias", None) for layer in layers]
    weight = torch.cat([layer.weight for layer in layers])
    known = [bias for bias in biases if bias is not None]
    return weight, torch.cat(known) if known else None


def refuse(problem: str, remedy: str) -> ModelError:
    """The error for a variant that an adapter does not serve."""
    return ModelError("model", problem, remedy)


def _eos_tokens(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.eos_token_id
    if eos is None:
        return frozenset()
    tokens = eos if isinstance(eos, list | tuple) else [eos]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in tokens):
        raise refuse(
            f"has an eos_token_id of {eos!r:.60}, which is neither a token id nor a list of them",
            "Correct it in generation_config.json or config.json",
        )
    # Published configurations name ids beyond the vocabulary, and -1 for none: no token has them.
    vocab = int(model.config.vocab_size)
    return frozenset(each for each in tokens if 0 <= each < vocab)


def _refuse_quantised(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise refuse(
            "has quantised weights, whose keys and values the fill cannot fold",
            "Use the model in float32 or bfloat16",
        )


def _refuse_sliding_window(config: Any, everywhere: bool) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = None if everywhere else getattr(config, "layer_types", None)
    others = sorted(set(kinds or ()) - {"full_attention", "sliding_attention"})
    if others:
        raise refuse(f"has {others[0]!r} layers", "Use a model with full attention in all layers")
    slides = kinds is None or "sliding_attention" in kinds
    if slides and window is not None and window < config.max_position_embeddings:
        raise refuse(
            f"uses sliding-window attention over {window} tokens, which is not supported yet",
            "Use a model with full attention, or set sliding_window to null in config.json",
        )


def _refuse_dynamic_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise refuse(
            f"uses {kind!r} rotary embeddings, whose angles depend on more than the position",
            f"Use a model with {', '.join(STATIC_ROPE[:-1])} or {STATIC_ROPE[-1]} ones",
        )
