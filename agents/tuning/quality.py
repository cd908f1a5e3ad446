"""What each exit says compared with full depth, on held-out documents.

Shape suffixes: T tokens, D width, V vocabulary, W documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.agents.evaluation.statistics import bootstrap_ratio
from offramp.agents.tuning.distil import states_at
from offramp.agents.tuning.exit_losses import blocks, kl_of_logits
from offramp.agents.tuning.texts import HeldOutText
from offramp.worker.model.adapter_layers import AdapterLayers
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import UNTRANSLATED, ExitTranslators


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
class Comparison:
    """Quality per exit on held-out text, before (plain norm and head) and after.

    Attributes:
        documents: How many documents were measured.
        tokens: How many tokens were measured.
        before: Quality by exit, full depth last, with none.
        after: The same with what was fitted, in the model's dtype.
        gains: Per exit: gain in agreement and its 95 % interval (bootstrap over documents).
    """

    documents: int
    tokens: int
    before: list[ExitQuality]
    after: list[ExitQuality]
    gains: list[tuple[float, float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneReport(Comparison):
    """What a run came to: on documents as they are, and on the model's own text after them.

    Attributes:
        own: The comparison on the model's own text, prompts left out.
        curve: Training KL: step, then each exit's batch mean, nats.
    """

    own: Comparison
    curve: list[list[float]]

    @classmethod
    def of(cls, people: Comparison, own: Comparison, curve: list[list[float]]) -> TuneReport:
        """Put both comparisons and the curve together."""
        shown = {each.name: getattr(people, each.name) for each in fields(people)}
        return cls(**shown, own=own, curve=curve)


@torch.inference_mode()
def measure(
    stack: LayerStack,
    translators: ExitTranslators | AdapterLayers,
    windows: Sequence[Sequence[int]],
    exits: Sequence[int],
    firsts: Sequence[int] = (),
) -> Sums:
    """Sums per document at each exit and at full depth.

    Args:
        stack: The model that the exits are in.
        translators: What exits are read through, as decoding applies it, in the model's dtype.
        windows: Documents of T + 1 tokens; the last token is only ever a label.
        exits: Layers that are measured.
        firsts: Position in each document of the first token measured; (): all are.
    """
    rows: dict[int, list[list[float]]] = {layer: [] for layer in (*exits, stack.layers)}
    for tokens, first in zip(windows, firsts or [0] * len(windows), strict=True):
        inputs = torch.tensor([tokens[:-1]], device=stack.device)
        labels_T = torch.tensor(tokens[1:], device=stack.device)
        states, last_TD = states_at(stack, inputs, exits)
        for layer in rows:
            x_TD = last_TD if layer == stack.layers else translators.apply(layer, states[layer])
            rows[layer].append(_sums(stack, x_TD[first:], last_TD[first:], labels_T[first:]))
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
    stack: LayerStack,
    fitted: ExitTranslators | AdapterLayers,
    texts: HeldOutText,
    exits: Sequence[int],
    seed: int,
) -> Comparison:
    """Read exits with nothing fitted, and with what was; the seed is the bootstrap's."""
    before, after = (
        measure(stack, each, texts.windows, exits, texts.firsts) for each in (UNTRANSLATED, fitted)
    )
    tokens_W: NDArray[np.float64] = np.asarray(texts.tokens, np.float64)
    total = int(tokens_W.sum())
    gains = (after[layer][:, 0] - before[layer][:, 0] for layer in exits)
    estimates = (bootstrap_ratio(gain_W, tokens_W, seed) for gain_W in gains)
    return Comparison(
        documents=len(texts.windows),
        tokens=total,
        before=summarise(before, total),
        after=summarise(after, total),
        gains=[(each.value, each.low, each.high) for each in estimates],
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
