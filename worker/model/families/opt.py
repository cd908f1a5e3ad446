"""OPT: learned positions, LayerNorm, separate projections.

Shape suffixes: B rows, T tokens, D width, R stacked key and value rows.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp.worker.model.families.adapter import HFStack, refuse, stacked
from offramp.worker.model.stack import KVWeights


class OPTStack(HFStack):
    """OPT with the norm before attention, as all sizes but 350m have it."""

    blocks_path: ClassVar[str] = "model.decoder.layers"
    embed_path: ClassVar[str] = "model.decoder.embed_tokens"
    norm_path: ClassVar[str] = "model.decoder.final_layer_norm"
    rotary_path: ClassVar[str] = ""
    shares_kv_heads: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._positions = model.model.decoder.embed_positions

    @classmethod
    def require_servable(cls, config: Any) -> None:
        """Refuse, beside what no family serves, what only opt-350m and old fine-tunes have."""
        super().require_servable(config)
        # Defaults: a config.json may name this architecture and another model_type.
        if not getattr(config, "do_layer_norm_before", True):
            raise refuse(
                "normalises after attention (do_layer_norm_before is false, as in opt-350m), so an "
                "exit has no final norm to go through",
                "Use another size of OPT",
            )
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)
        if width != config.hidden_size:
            raise refuse(
                f"projects embeddings of {width} to {config.hidden_size} (word_embed_proj_dim)",
                "Use another size of OPT",
            )
        if getattr(config, "_remove_final_layer_norm", False):
            raise refuse(
                "has no final norm (_remove_final_layer_norm)",
                "Use a checkpoint converted by transformers 4.20.1 or later",
            )

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Token and position embeddings, [B, T, D]; the module itself skips its two first rows."""
        where_BTD = self._positions(None, position_ids=positions_BT)
        return self._embed(tokens_BT) + where_BTD  # type: ignore[no-any-return]

    def kv_weights(self, index: int) -> KVWeights:
        """One layer's input norm and key/value projections."""
        block = self._layers[index]
        norm = block.self_attn_layer_norm
        weight_RD, bias_R = stacked((block.self_attn.k_proj, block.self_attn.v_proj))
        return KVWeights(
            norm="layer",
            # Without layer_norm_elementwise_affine the norm has neither weight nor bias.
            scale_D=torch.ones_like(weight_RD[0]) if norm.weight is None else norm.weight,
            shift_D=norm.bias,
            eps=float(norm.eps),
            weight_RD=weight_RD,
            bias_R=bias_R,
            rotates=False,
        )
