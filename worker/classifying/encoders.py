"""Encoders as stacks over sequences: BERT (and MiniLM), RoBERTa, DistilBERT, layer by layer.

Shape suffixes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from offramp.controller.errors import ModelError
from offramp.worker.classifying.sequence_stack import Pool, Surroundings, padding_mask


class EncoderStack:
    """Unmodified Hugging Face encoder layers of the BERT family, driven one by one.

    A family says in class attributes in which it differs from BERT.

    Args:
        model: An encoder without a head, such as ``BertModel``, in evaluation mode.

    Raises:
        ModelError: a variant of the family that is not supported.
    """

    blocks_path: ClassVar[str] = "encoder.layer"
    best_pool: ClassVar[Pool] = "mean"
    options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    """What loading is told beside: heads here read layers, never Hugging Face's pooler."""

    def __init__(self, model: Any) -> None:
        config = model.config
        if getattr(config, "is_decoder", False):
            raise ModelError("model", "is an encoder made causal", "Set is_decoder to false")
        self.model = model
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.context = int(config.max_position_embeddings) - self._first_position(config)
        self.vocab = int(config.vocab_size)
        self.device: torch.device = model.device
        self._embeddings = model.embeddings
        self._blocks: tuple[Any, ...] = tuple(model.get_submodule(self.blocks_path))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings of words, positions and the one segment, [B, T, D]."""
        return self._embeddings(input_ids=tokens_BT)  # type: ignore[no-any-return]

    def surroundings(self, x_BTD: Tensor, lengths: Sequence[int]) -> Surroundings:
        """The mask that hides padding."""
        return Surroundings(padding_mask(x_BTD, lengths))

    def run_layer(self, index: int, x_BTD: Tensor, around: Surroundings) -> Tensor:
        """One encoder layer, [B, T, D]."""
        mask = around.mask
        if mask is not None:  # torch's kernels want the queries' axis, too
            mask = mask.expand(-1, -1, x_BTD.shape[1], -1)
        return self._blocks[index](x_BTD, attention_mask=mask)  # type: ignore[no-any-return]

    def read(self, x_BTD: Tensor) -> Tensor:
        """The states as they are: each layer ends in a norm."""
        return x_BTD

    def _first_position(self, config: Any) -> int:
        return 0


class RobertaStack(EncoderStack):
    """RoBERTa: positions begin after the id of the padding token."""

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """The embeddings, with positions counted as if nothing were padding, [B, T, D]."""
        first = self._first_position(self.model.config)
        positions_T = torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = positions_T.expand_as(tokens_BT)
        return self._embeddings(  # type: ignore[no-any-return]
            input_ids=tokens_BT, position_ids=positions_BT
        )

    def _first_position(self, config: Any) -> int:
        return int(config.pad_token_id) + 1


class DistilBertStack(EncoderStack):
    """DistilBERT: no segments, no pooler, another path."""

    blocks_path: ClassVar[str] = "transformer.layer"
    options: ClassVar[dict[str, Any]] = {}


ENCODERS: MappingProxyType[str, type[EncoderStack]] = MappingProxyType(
    {"bert": EncoderStack, "roberta": RobertaStack, "distilbert": DistilBertStack}
)
"""The adapter of each encoder family, by the ``model_type`` of its config.json."""
