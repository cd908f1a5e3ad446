"""Llama and the families that differ from it in details: Mistral, Qwen2, Qwen3, SmolLM3, Phi-3.

Shape suffixes: D width, R stacked key and value rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from offramp.worker.model.families.adapter import HFStack, stacked
from offramp.worker.model.stack import KVWeights


class LlamaStack(HFStack):
    """Llama, Qwen2 (biases), Qwen3 (key norms) and SmolLM3 (some layers without rotation)."""

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self._layers[index]
        key_norm = getattr(block.self_attn, "k_norm", None)
        weight_RD, bias_R = self._projections(block.self_attn)
        return KVWeights(
            norm="rms",
            scale_D=block.input_layernorm.weight,
            shift_D=None,
            eps=float(block.input_layernorm.variance_epsilon),
            weight_RD=weight_RD,
            bias_R=bias_R,
            key_norm_H=None if key_norm is None else key_norm.weight,
            key_norm_eps=0.0 if key_norm is None else float(key_norm.variance_epsilon),
            rotates=bool(getattr(block.self_attn, "use_rope", True)),
        )

    def _projections(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        return stacked((attention.k_proj, attention.v_proj))


class MistralStack(LlamaStack):
    """Mistral: the model slides in every layer if its configuration has a window."""

    window_everywhere: ClassVar[bool] = True


class Phi3Stack(MistralStack):
    """Phi-3: queries, keys and values from one matrix; only part of each key is rotated."""

    def _projections(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        weight_RD, bias_R = stacked((attention.qkv_proj,))
        rows = 2 * self.kv_heads * self.head_dim
        return weight_RD[-rows:], None if bias_R is None else bias_R[-rows:]
