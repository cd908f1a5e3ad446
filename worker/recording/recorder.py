"""Record traces: what each exit saw and would have emitted, in one full-depth pass.

Shape suffixes: T tokens, D width, V vocabulary, K candidates, E exits, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.exits import is_on_copy
from offramp.controller.traces import TraceChunk
from offramp.worker.model.adapter_layers import AdapterLayers
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import UNTRANSLATED, ExitTranslators
from offramp.worker.probes import Candidates, ProbeInputs, Readout, make_probe, softmax_features
from offramp.worker.probes.candidates.successors import NgramIndex, candidates_of
from offramp.worker.recording.copy_pass import CopyPass

_Asked = tuple[FloatArray, FloatArray, IntArray, Tensor]
"""Features, the first three softmax columns, the exit's token and what was read, [T, ...] each."""


@torch.inference_mode()
def record_document(
    stack: LayerStack,
    document: str,
    tokens: Sequence[int],
    exits: Sequence[int],
    candidates_VK: IntArray,
    schema: FeatureSchema = CANDIDATES_V1,
    translators: ExitTranslators | AdapterLayers = UNTRANSLATED,
    states: bool = False,
    headless: bool = False,
    copy: CopyPass | None = None,
) -> TraceChunk:
    """Decode one document at full depth, teacher-forced, and probe every token at every exit.

    All positions run in one pass; a probe computes in each row what it computes live (tested).

    Args:
        stack: The model, as a stack of layers.
        document: Digest of the document's text.
        tokens: T + 1 token ids; the last is only ever a label.
        exits: Layers to probe, ascending; those on a copy first.
        candidates_VK: The candidate table.
        schema: The features to record.
        translators: What the model's exits are read through.
        states: Whether to keep the hidden states that norm and head read, as float16.
        headless: Whether an exit's token is the best candidate, as sure as it is among them.
        copy: Runs tokens up to exits on a copy, if there are any.
    """
    inputs = list(tokens[:-1])
    positions_T = np.arange(len(inputs), dtype=np.int32)
    positions_1T = torch.from_numpy(positions_T)[None].to(stack.device)
    x_TD = stack.embed(torch.tensor([inputs], device=stack.device), positions_1T)
    rotary = stack.rotary(x_TD, positions_1T)
    scored = (len(exits), _candidates(inputs, candidates_VK), candidates_VK)
    begun = (schema, x_TD[0], positions_T, scored, headless)
    asked = []
    if copy is not None:
        ask = _asking(copy.copy, *begun)
        on_copy = [layer for layer in exits if is_on_copy(layer)]
        asked += [ask(layer, read_TD) for layer, read_TD in copy.states(inputs, on_copy).items()]
    ask = _asking(stack, *begun)
    for index in range(stack.layers):
        x_TD = stack.run_layer(index, x_TD, rotary, None, None)
        if index + 1 in exits:
            asked.append(ask(index + 1, translators.apply(index + 1, x_TD[0])))
    full_TV = stack.logits(x_TD[0]).float().log_softmax(-1)
    features, sure, exit_tokens, read = zip(*asked, strict=True)
    token_TE = np.stack(exit_tokens, axis=-1)
    return TraceChunk(
        document=document,
        position_T=positions_T,
        features_TEF=np.stack(features, axis=1),
        softmax_TES=np.stack(sure, axis=1),
        exit_token_TE=token_TE,
        full_token_T=_int32(full_TV.argmax(-1)),
        next_token_T=np.asarray(tokens[1:], np.int32),
        gap_TE=_gaps(full_TV, token_TE),
        state_TED=torch.stack(read, dim=1).half().cpu().numpy() if states else None,
    )


def _asking(
    stack: LayerStack,
    schema: FeatureSchema,
    embedded_TD: Tensor,
    positions_T: IntArray,
    scored: tuple[int, IntArray, IntArray],
    headless: bool,
) -> Callable[[int, Tensor], _Asked]:
    """Make what probes states of a stack, exit by exit."""
    probe = make_probe(schema, ProbeInputs(Readout(stack), embedded_TD, positions_T, *scored))

    def ask(executed: int, read_TD: Tensor) -> _Asked:
        features_TF = probe.features(int(executed), read_TD)
        if headless:
            return features_TF, features_TF[:, :3], cast(Candidates, probe).best_N(), read_TD
        logits_TV = stack.logits(read_TD)
        return features_TF, softmax_features(logits_TV)[0], _int32(logits_TV.argmax(-1)), read_TD

    return ask


def _gaps(full_TV: Tensor, token_TE: IntArray) -> FloatArray:
    """Log-probability of each token less that of the likeliest, at full depth."""
    tokens = torch.from_numpy(token_TE).long().to(full_TV.device)
    gap_TE = full_TV.gather(-1, tokens) - full_TV.max(-1, keepdim=True).values
    gaps: FloatArray = gap_TE.cpu().numpy()
    return gaps


def _candidates(inputs: Sequence[int], table_VK: IntArray) -> IntArray:
    ngrams = NgramIndex(())
    rows = np.empty((len(inputs), table_VK.shape[1]), np.int32)
    for index, token in enumerate(inputs):
        ngrams.push(token)
        rows[index] = candidates_of([ngrams], table_VK, ())[0]
    return rows


def _int32(tensor: Tensor) -> IntArray:
    return tensor.to(torch.int32).cpu().numpy()
