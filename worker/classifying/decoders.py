"""Causal LMs as stacks over sequences: a prefill that is never decoded after.

Shape suffixes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from offramp.worker.classifying.sequence_stack import Pool, Surroundings
from offramp.worker.model.stack import LayerStack


class DecoderStack:
    """The layers of a causal LM over whole sequences, without a cache and without its LM head.

    Padding is on the right, where causal attention never looks.

    Args:
        stack: The model behind its family's adapter.
    """

    best_pool: ClassVar[Pool] = "mean"

    def __init__(self, stack: LayerStack) -> None:
        self.layers = stack.layers
        self.width = stack.width
        self.context = stack.context
        self.vocab = stack.vocab
        self.device = stack.device
        self._stack = stack

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Embeddings of tokens, and of positions where the family has such, [B, T, D]."""
        return self._stack.embed(tokens_BT, self._positions(tokens_BT).expand_as(tokens_BT))

    def surroundings(self, x_BTD: Tensor, lengths: Sequence[int]) -> Surroundings:
        """The rotary embeddings, which are the same in all rows."""
        return Surroundings(rotary=self._stack.rotary(x_BTD[:1], self._positions(x_BTD[:1, :, 0])))

    def run_layer(self, index: int, x_BTD: Tensor, around: Surroundings) -> Tensor:
        """One decoder layer, [B, T, D]."""
        return self._stack.run_layer(index, x_BTD, around.rotary, None, None)

    def read(self, x_BTD: Tensor) -> Tensor:
        """The states through the final norm, without which a few huge columns drown the rest."""
        return self._stack.norm(x_BTD)

    def _positions(self, like_BT: Tensor) -> Tensor:
        return torch.arange(like_BT.shape[1], device=like_BT.device)[None]
