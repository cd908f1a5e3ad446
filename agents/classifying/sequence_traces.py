"""Classified texts as recorded tokens: one token per text, whose vocabulary is the classes.

So every environment, agent and replay of tokens is one of sequences: ``exit_token`` is the class
that an exit finds, ``right`` whether it is the label's, and ``quality="label"`` the reward.

Shape suffixes: N texts, E exits, C classes, D width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from offramp.agents.classifying.labelled_texts import LabelledTexts, text_digest
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.probes.softmax import SoftmaxMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadTexts:
    """Texts that a model has read.

    Attributes:
        texts: The texts with their classes.
        lengths_N: Tokens of each.
        model: Fingerprint of the model.
        context: Most tokens of a sequence.
    """

    texts: LabelledTexts
    lengths_N: IndexArray
    model: str
    context: int

    def of(self, places: IndexArray) -> ReadTexts:
        """Some of them, in the order given."""
        return replace(self, texts=self.texts.of(places), lengths_N=self.lengths_N[places])


def read_texts(
    model: SequenceModel, texts: LabelledTexts, sequences: Sequence[Sequence[int]]
) -> ReadTexts:
    """Texts as a model has read them.

    Args:
        model: The model that has.
        texts: The texts with their classes.
        sequences: Token ids of each.
    """
    return ReadTexts(
        texts=texts,
        lengths_N=np.array([len(tokens) for tokens in sequences]),
        model=model.fingerprint,
        context=model.stack.context,
    )


def sequence_traces(heads: ClassHeads, states_NED: FloatArray, read: ReadTexts) -> TokenTraces:
    """What each exit says of texts, as an environment replays it.

    Args:
        heads: Heads of all exits, the last of which is full depth's.
        states_NED: Pooled states after each of them.
        read: The texts, which are the documents of these traces.

    Raises:
        TraceError: a label is none of the heads'.
    """
    states = torch.from_numpy(states_NED)
    logits = [heads.logits(layer, states[:, place]) for place, layer in enumerate(heads.exits)]
    return traces_of_logits(torch.stack(logits), heads, read)


def traces_of_logits(logits_ENC: Tensor, heads: ClassHeads, read: ReadTexts) -> TokenTraces:
    """The same of logits, by exit, that these or other heads of the same exits gave."""
    *exits, layers = heads.exits
    label_N = read.texts.indices(heads.labels)
    position_N = ((read.lengths_N - 1) / read.context).astype(np.float32)
    memory = SoftmaxMemory(len(exits), layers, position_N)
    features, tokens = [], []
    full_NC = logits_ENC[-1].log_softmax(-1)
    gaps = []
    for layer, logits_NC in zip(exits, logits_ENC, strict=False):  # full depth's are left
        features.append(memory.features(layer, logits_NC))
        best_N = logits_NC.argmax(-1)
        tokens.append(best_N.numpy())
        chosen_N = full_NC.gather(-1, best_N[:, None])[:, 0]
        gaps.append((chosen_N - full_NC.max(-1).values).numpy())
    token_NE = np.stack(tokens, axis=1).astype(np.int32)
    full_N = full_NC.argmax(-1).numpy()
    names = [text_digest(text) for text in read.texts.texts]
    index = {name: place for place, name in enumerate(dict.fromkeys(names))}
    features_NEF = np.stack(features, axis=1)
    return TokenTraces(
        header=TraceHeader(
            model=read.model,
            schema=SOFTMAX_V2.digest,
            exits=tuple(exits),
            layers=layers,
            translators=heads.digest,
        ),
        features_NEF=features_NEF,
        softmax_NES=features_NEF[:, :, :3],
        exit_token_NE=token_NE,
        agree_NE=(token_NE == full_N[:, None]).astype(np.float32),
        gap_NE=np.stack(gaps, axis=1),
        right_NE=(token_NE == label_N[:, None]).astype(np.float32),
        full_right_N=(full_N == label_N).astype(np.float32),
        position_N=read.lengths_N.astype(np.int32) - 1,
        document_N=np.array([index[name] for name in names], np.int32),
        documents=tuple(index),
    )
