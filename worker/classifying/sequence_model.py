"""Load a model that classifies: an encoder, or a causal LM, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from offramp.controller.errors import RequestError
from offramp.worker.classifying.class_heads import ClassHeads, labels_in
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.decoders import DecoderStack
from offramp.worker.classifying.encoders import ENCODERS
from offramp.worker.classifying.sequence_stack import SequenceStack
from offramp.worker.engine.encoding import require_length, require_unicode
from offramp.worker.hf.weight_files import require_weights
from offramp.worker.model.families import stack_for
from offramp.worker.model.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    read_model,
    require_device,
    tokenizer_fingerprint,
)


def check_classifier(model: str | Path, heads: Path) -> tuple[str, ...]:
    """Refuse a model that cannot classify, or a folder without heads, before weights are loaded.

    Returns:
        The names of the classes.

    Raises:
        ModelError: folder missing, an unsupported architecture, or damaged weights.
        ConfigError: the folder holds no heads.
    """
    if load_config(model).model_type in ENCODERS:
        require_weights(model)
    else:
        check_model(model)
    return labels_in(heads)


@dataclass(frozen=True, slots=True)
class SequenceModel:
    """A model that reads whole texts, ready to be classified with.

    Attributes:
        stack: Runs the layers.
        module: The model as Hugging Face made it, whose layers these are.
        tokenizer: What turns a text into ids.
        fingerprint: SHA-256 of the weights.
        tokenizer_fingerprint: SHA-256 of the tokenizer.
    """

    stack: SequenceStack
    module: Any
    tokenizer: Any
    fingerprint: str
    tokenizer_fingerprint: str

    @classmethod
    def load(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> SequenceModel:
        """Load an encoder of the BERT family, or any causal LM that the engine serves.

        Raises:
            ModelError: folder missing, an unsupported architecture, or damaged weights.
            ConfigError: there is no such device.
        """
        require_device(device)
        transformers_logging.disable_progress_bar()
        config = load_config(path)
        encoder = ENCODERS.get(config.model_type)
        stack: SequenceStack
        if encoder is None:
            model = load_model(path, dtype, device)
            stack = DecoderStack(stack_for(model))
        else:
            require_weights(path)
            model = read_model(AutoModel, path, dtype, device, **encoder.options)
            stack = encoder(model)
        tokenizer = load_tokenizer(path)
        return cls(
            stack, model, tokenizer, model_fingerprint(model), tokenizer_fingerprint(tokenizer)
        )

    def classifier(self, heads: str | Path) -> Classifier:
        """The model with the heads of a folder that ``offramp tune --task classify`` wrote.

        Raises:
            ConfigError: field ``heads``; the folder holds none, or another model's.
        """
        return Classifier(self.stack, self.heads(heads))

    def heads(self, folder: str | Path) -> ClassHeads:
        """The heads of such a folder; raises as ``classifier`` does."""
        return ClassHeads.load(Path(folder), self.fingerprint, self.stack.layers, self.stack.width)

    def encode(
        self, texts: Sequence[str], name: Callable[[int], str] = "input[{}]".format
    ) -> list[list[int]]:
        """Token ids of texts, with the marks that the tokenizer sets around one.

        Args:
            texts: The texts.
            name: What errors call a text, by its place.

        Raises:
            RequestError: a text is empty, longer than the context, or no text; its name is the
                field.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise RequestError("input", f"{texts!r:.60} is no list of texts", "Put it in a list")
        if not texts:
            raise RequestError("input", "is empty", "Send one text or more")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise RequestError(name(place), f"{text!r:.60} is no text", "Give a string")
            if not text.strip():
                raise RequestError(name(place), "is empty", "Leave it out, or give it words")
            require_unicode(name(place), text)
        # Longer than the context is refused below, in a sentence of ours.
        found: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        marks = self.tokenizer.num_special_tokens_to_add()
        for place, tokens in enumerate(found):
            require_length(name(place), len(tokens), self.stack.context, marks)
        return found
