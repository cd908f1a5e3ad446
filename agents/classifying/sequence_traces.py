"""Classified texts as recorded tokens: one token per text, whose vocabulary is the classes.

So every environment, agent and replay of tokens is one of sequences: ``exit_token`` is the class
that an exit finds, ``right`` whether it is the label's, and ``quality="label"`` the reward.

Shape suffixes: N texts, E exits, C classes, D width, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.probes.softmax import SoftmaxMemory


def sequence_traces(
    heads: ClassHeads,
    states_NED: FloatArray,
    label_N: IndexArray,
    lengths_N: Sequence[int],
    texts: Sequence[str],
    *,
    model: str,
    context: int,
) -> TokenTraces:
    """What each exit says of texts, as an environment replays it.

    Args:
        heads: Heads of all exits, the last of which is full depth's.
        states_NED: Pooled states after each of them.
        label_N: Index of the class of each text.
        lengths_N: Tokens of each text.
        texts: The texts, which are the documents of these traces.
        model: Fingerprint of the model.
        context: Most tokens of a sequence.
    """
    *exits, layers = heads.exits
    position_N = ((np.asarray(lengths_N) - 1) / context).astype(np.float32)
    memory = SoftmaxMemory(len(exits), layers, position_N)
    features, tokens = [], []
    states = torch.from_numpy(states_NED)
    full_NC = heads.logits(layers, states[:, -1]).log_softmax(-1)
    gaps = []
    for place, layer in enumerate(exits):
        logits_NC = heads.logits(layer, states[:, place])
        features.append(memory.features(layer, logits_NC))
        best_N = logits_NC.argmax(-1)
        tokens.append(best_N.numpy())
        chosen_N = full_NC.gather(-1, best_N[:, None])[:, 0]
        gaps.append((chosen_N - full_NC.max(-1).values).numpy())
    token_NE = np.stack(tokens, axis=1).astype(np.int32)
    full_N = full_NC.argmax(-1).numpy()
    names = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    index = {name: place for place, name in enumerate(dict.fromkeys(names))}
    features_NEF = np.stack(features, axis=1)
    return TokenTraces(
        header=TraceHeader(
            model=model,
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
        position_N=np.asarray(lengths_N, np.int32) - 1,
        document_N=np.array([index[name] for name in names], np.int32),
        documents=tuple(index),
    )
