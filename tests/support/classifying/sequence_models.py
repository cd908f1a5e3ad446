"""Small random encoders, and policies that let given rows leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from offramp.controller.features import SOFTMAX_V2, BoolArray, FloatArray
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.encoders import ENCODERS, EncoderStack

ENCODER_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ENCODER_CLASSES: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "distilbert": (DistilBertConfig, DistilBertModel),
}
DISTILBERT_SHAPE = {"dim": 48, "hidden_dim": 96, "n_layers": 5, "n_heads": 4}
LABELS = ("red", "green", "blue")
RAGGED = ([5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18])
"""Token ids of three sequences."""


def make_encoder(family: str, dtype: torch.dtype = torch.float32, layers: int = 5) -> Any:
    """A random encoder of a family, of the first so many of five layers."""
    config_class, model_class = ENCODER_CLASSES[family]
    torch.manual_seed(1)
    extra = DISTILBERT_SHAPE if family == "distilbert" else {}
    model = model_class(config_class(**ENCODER_SHAPE, **extra), **ENCODERS[family].options)
    stacked = model.get_submodule(ENCODERS[family].blocks_path)
    del stacked[layers:]
    return model.to(dtype).eval().requires_grad_(False)


def encoder_stack(family: str = "bert", dtype: torch.dtype = torch.float32) -> EncoderStack:
    return ENCODERS[family](make_encoder(family, dtype))


def random_heads(layers: int = 5, width: int = 48, seed: int = 2) -> ClassHeads:
    """A head after each layer, unlike the others."""
    torch.manual_seed(seed)
    return ClassHeads(
        LABELS,
        "mean",
        {e: ClassHead(torch.randn(3, width), torch.randn(3)) for e in range(1, layers + 1)},
    )


def like_heads(bounds: Sequence[torch.Tensor] = ()) -> ClassHeads:
    """The same head after each layer, so that an exit tells of full depth, which some bound."""
    head = random_heads().head(5)
    by_layer = dict.fromkeys(range(1, 6), head)
    for layer, bound_C2 in enumerate(bounds, start=1):
        by_layer[layer] = replace(head, bound_C2=bound_C2)
    return ClassHeads(LABELS, "mean", by_layer)


class ByLength:
    """Lets sequences of at most so many tokens leave after each layer: one number per exit."""

    schema = SOFTMAX_V2
    candidates_VK = None

    def __init__(self, most: dict[int, int], context: int = 64) -> None:
        self.exits = tuple(sorted(most))
        self._most, self._context = most, context
        self.asked: list[int] = []

    def leave(self, features_NF: FloatArray) -> BoolArray:
        layer = round(float(features_NF[0, SOFTMAX_V2.index("depth")]) * 5)
        self.asked.append(len(features_NF))
        tokens_N = features_NF[:, SOFTMAX_V2.index("position")] * self._context + 1
        return np.asarray(np.rint(tokens_N) <= self._most[layer])
