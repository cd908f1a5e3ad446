"""Gemma, the first generation.

Shape suffixes: D width, R stacked key and value rows.
"""

from __future__ import annotations

from typing import Any

from offramp.worker.model.families.adapter import HFStack, refuse, stacked
from offramp.worker.model.stack import KVWeights


class GemmaStack(HFStack):
    """Llama's layout; norms multiply by 1 + weight. The embedding module scales by √D itself."""

    @classmethod
    def require_servable(cls, config: Any) -> None:
        """Refuse, beside what no family serves, attention in both directions."""
        super().require_servable(config)
        if getattr(config, "use_bidirectional_attention", None):
            raise refuse(
                "attends in both directions (use_bidirectional_attention), so it cannot decode",
                "Use a causal Gemma",
            )

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self._layers[index]
        weight_RD, bias_R = stacked((block.self_attn.k_proj, block.self_attn.v_proj))
        return KVWeights(
            norm="rms",
            scale_D=1.0 + block.input_layernorm.weight.float(),
            shift_D=None,
            eps=float(block.input_layernorm.eps),
            weight_RD=weight_RD,
            bias_R=bias_R,
        )
