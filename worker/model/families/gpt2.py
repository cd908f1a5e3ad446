"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values.

Shape suffixes: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from offramp.worker.model.families.adapter import HFStack, refuse
from offramp.worker.model.stack import KVWeights


class GPT2Stack(HFStack):
    """GPT-2. Positions enter with the embeddings, so no layer rotates."""

    blocks_path: ClassVar[str] = "transformer.h"
    embed_path: ClassVar[str] = "transformer.wte"
    norm_path: ClassVar[str] = "transformer.ln_f"
    rotary_path: ClassVar[str] = ""
    shares_kv_heads: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._positions = model.transformer.wpe

    @classmethod
    def require_servable(cls, config: Any) -> None:
        """Refuse, beside what no family serves, cross-attention and upcast attention."""
        super().require_servable(config)
        if getattr(config, "add_cross_attention", False):
            raise refuse("attends to an encoder (add_cross_attention)", "Use a decoder-only GPT-2")
        if getattr(config, "reorder_and_upcast_attn", False):
            # Hugging Face upcasts only in eager attention, and drops the option silently in sdpa.
            raise refuse(
                "asks for upcast attention (reorder_and_upcast_attn), which sdpa does not do",
                "Set reorder_and_upcast_attn to false in config.json",
            )

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Token and position embeddings, [B, T, D]."""
        return self._embed(tokens_BT) + self._positions(positions_BT)  # type: ignore[no-any-return]

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self._layers[index]
        fused = block.attn.c_attn
        return KVWeights(
            norm="layer",
            scale_D=block.ln_1.weight,
            shift_D=block.ln_1.bias,
            eps=float(block.ln_1.eps),
            # Conv1D holds its matrix transposed; the first D outputs are queries.
            weight_RD=fused.weight.t()[self.width :],
            bias_R=fused.bias[self.width :],
            rotates=False,
        )
