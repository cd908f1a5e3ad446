"""GPT-NeoX and Pythia: LayerNorm, partial rotation, queries, keys and values fused head by head.

Shape suffixes: B rows, T tokens, D width, G heads, H head_dim, R stacked key and value rows.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from offramp.worker.model.families.adapter import HFStack
from offramp.worker.model.stack import KVWeights


class GPTNeoXStack(HFStack):
    """GPT-NeoX, with parallel residuals or without: the layer itself knows."""

    blocks_path: ClassVar[str] = "gpt_neox.layers"
    embed_path: ClassVar[str] = "gpt_neox.embed_in"
    norm_path: ClassVar[str] = "gpt_neox.final_layer_norm"
    rotary_path: ClassVar[str] = "gpt_neox.rotary_emb"
    cache_name: ClassVar[str] = "layer_past"
    shares_kv_heads: ClassVar[bool] = False

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self._layers[index]
        fused = block.attention.query_key_value
        norm = block.input_layernorm
        return KVWeights(
            norm="layer",
            scale_D=norm.weight,
            shift_D=norm.bias,
            eps=float(norm.eps),
            weight_RD=self._unfused(fused.weight),
            bias_R=None if fused.bias is None else self._unfused(fused.bias),
        )

    def _unfused(self, fused: Tensor) -> Tensor:
        """Rows that lie as (query, key, value) within each head, as all keys, then all values."""
        by_head = fused.reshape(self.kv_heads, 3, self.head_dim, *fused.shape[1:])
        return by_head[:, 1:].transpose(0, 1).flatten(0, 2)
