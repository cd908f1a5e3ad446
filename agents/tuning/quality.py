"""What each exit says compared with full depth, on held-out documents.

Shape suffixes: T tokens, D width, V vocabulary, W documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.agents.evaluation.statistics import bootstrap_ratio
from offramp.agents.tuning.distil import blocks, kl_of_logits, states_at
from offramp.worker.model.adapter_layers import AdapterLayers
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import ExitTranslators


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitQuality:
    """One exit on held-out documents, teacher-forced, with an exact cache.

    Attributes:
        layer: Layers executed before the exit.
        agreement: Share of tokens whose most likely successor is full depth's.
        kl: KL(full depth ‖ exit), mean nats per token.
        accuracy: Share of tokens whose most likely successor is the document's.
        nll: −ln P(the document's token), mean nats per token.
    """

    layer: int
    agreement: float
    kl: float
    accuracy: float
    nll: float


Sums = dict[int, NDArray[np.float64]]
"""By layer: agreement, KL, right, NLL summed over each document's tokens, [W, 4]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport:
    """Quality per exit on held-out documents, before (plain norm and head) and after.

    Attributes:
        documents: Held-out documents.
        tokens: Held-out tokens.
        before: By ascending layer; full depth is the last.
        after: Quality with translators; full depth is unchanged.
        gains: Per exit: gain in agreement and its 95 % interval (bootstrap over documents).
        curve: Training KL: step, then each exit's batch mean, nats.
    """

    documents: int
    tokens: int
    before: list[ExitQuality]
    after: list[ExitQuality]
    gains: list[tuple[float, float, float]]
    curve: list[list[float]]


@torch.inference_mode()
def measure(
    stack: LayerStack,
    translators: ExitTranslators | AdapterLayers,
    windows: Sequence[Sequence[int]],
    exits: Sequence[int],
) -> Sums:
    """Sums per document at each exit and at full depth.

    Args:
        stack: The model that the exits are in.
        translators: What exits are read through, as decoding applies it, in the model's dtype.
        windows: Documents of T + 1 tokens; the last token is only ever a label.
        exits: Layers that are measured.
    """
    rows: dict[int, list[list[float]]] = {layer: [] for layer in (*exits, stack.layers)}
    for tokens in windows:
        inputs = torch.tensor([tokens[:-1]], device=stack.device)
        labels_T = torch.tensor(tokens[1:], device=stack.device)
        states, last_TD = states_at(stack, inputs, exits)
        for layer in rows:
            x_TD = last_TD if layer == stack.layers else translators.apply(layer, states[layer])
            rows[layer].append(_sums(stack, x_TD, last_TD, labels_T))
    return {layer: np.asarray(each) for layer, each in rows.items()}


def summarise(sums: Sums, tokens: int) -> list[ExitQuality]:
    """Means over all tokens, by layer."""
    names = ("agreement", "kl", "accuracy", "nll")
    return [
        ExitQuality(
            layer=layer, **dict(zip(names, (sums_W4.sum(0) / tokens).tolist(), strict=True))
        )
        for layer, sums_W4 in sums.items()
    ]


def compare(
    windows: Sequence[Sequence[int]], before: Sums, after: Sums, seed: int, curve: list[list[float]]
) -> TuneReport:
    """The report of a run, from the sums per document before and after it."""
    tokens_W: NDArray[np.float64] = np.asarray([len(each) - 1 for each in windows], np.float64)
    tokens = int(tokens_W.sum())
    exits = list(after)[:-1]
    gains = (after[layer][:, 0] - before[layer][:, 0] for layer in exits)
    estimates = (bootstrap_ratio(gain_W, tokens_W, seed) for gain_W in gains)
    return TuneReport(
        documents=len(windows),
        tokens=tokens,
        before=summarise(before, tokens),
        after=summarise(after, tokens),
        gains=[(each.value, each.low, each.high) for each in estimates],
        curve=curve,
    )


def _sums(stack: LayerStack, x_TD: Tensor, last_TD: Tensor, labels_T: Tensor) -> list[float]:
    total_4 = torch.zeros(4, dtype=torch.float64)
    for part in blocks(len(x_TD), stack.vocab):
        final_TV, exit_TV = stack.logits(last_TD[part]).float(), stack.logits(x_TD[part]).float()
        said_T, labels = exit_TV.argmax(-1), labels_T[part]
        nll_T = torch.nn.functional.cross_entropy(exit_TV, labels, reduction="none")
        parts = (said_T == final_TV.argmax(-1), kl_of_logits(final_TV, exit_TV), said_T == labels)
        total_4 += torch.stack([each.double().sum() for each in (*parts, nll_T)]).cpu()
    return total_4.tolist()
