"""Fits a linear head on pooled states of a frozen model, sets its temperature, and measures it.

Shape suffixes: N texts, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.class_heads import ClassHead

PENALTIES = (1e-5, 1e-4, 1e-3)
"""Weights of the squared norm that are tried; the likelihood of held-out labels chooses."""

STEPS = 60
"""Most iterations of L-BFGS for each."""

BINS = 15
"""Bins of the calibration error, as Guo et al. 2017 have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadQuality:
    """How well the head after one exit does on texts that nothing was fitted to.

    Attributes:
        layer: Number of layers executed.
        accuracy: Share of the texts whose label it finds.
        error_before: Expected calibration error without the temperature.
        error_after: The same with it.
        temperature: What logits are divided by.
    """

    layer: int
    accuracy: float
    error_before: float
    error_after: float
    temperature: float


def fit_head(
    states_ND: Tensor,
    label_N: Tensor,
    chosen_ND: Tensor,
    chosen_N: Tensor,
    penalties: Sequence[float] = PENALTIES,
    classes: int = 0,
    weight_N: Tensor | None = None,
) -> tuple[ClassHead, float]:
    """Multinomial logistic regression on standardised states, which is folded into the weights.

    Args:
        states_ND: Pooled states to fit to, float32.
        label_N: Index of the class of each.
        chosen_ND: States of other texts, on which the weight of the penalty is chosen.
        chosen_N: Classes of those.
        penalties: Weights that are tried, ascending.
        classes: Number of classes, of some of which there may be no text; 0: the highest index + 1.
        weight_N: What each text to fit to counts, 1 in the mean; None: all count the same.

    Returns:
        The head, and the weight that was chosen.
    """
    classes = classes or int(max(label_N.max(), chosen_N.max())) + 1
    mean_D, std_D = states_ND.mean(0), states_ND.std(0).clamp_min(1e-4)
    scaled_ND, start = (states_ND - mean_D) / std_D, torch.zeros(classes, states_ND.shape[1] + 1)
    best: tuple[float, Tensor, float] | None = None
    for penalty in reversed(penalties):
        start = _regress(scaled_ND, label_N, penalty, start, weight_N)
        logits_NC = linear((chosen_ND - mean_D) / std_D, start[:, :-1], start[:, -1])
        loss = float(cross_entropy(logits_NC, chosen_N))
        if best is None or loss < best[0]:
            best = (loss, start, penalty)
    assert best is not None
    weight_CD = best[1][:, :-1] / std_D
    return ClassHead(weight_CD.contiguous(), best[1][:, -1] - weight_CD @ mean_D), best[2]


def _regress(
    scaled_ND: Tensor, label_N: Tensor, penalty: float, start: Tensor, weight_N: Tensor | None
) -> Tensor:
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_NC = linear(scaled_ND, weights[:, :-1], weights[:, -1])
        if weight_N is None:
            found = cross_entropy(logits_NC, label_N)
        else:
            found = (weight_N * cross_entropy(logits_NC, label_N, reduction="none")).mean()
        found = found + penalty * weights[:, :-1].square().sum()
        found.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach()


def temper(head: ClassHead, states_ND: Tensor, label_N: Tensor) -> tuple[ClassHead, float]:
    """Divide logits by the temperature at which held-out labels are likeliest (Guo et al. 2017).

    Returns:
        The head with it folded in, and the temperature.
    """
    logits_NC = head(states_ND)
    grid = np.geomspace(0.2, 5.0, 161)
    losses = [float(cross_entropy(logits_NC / float(t), label_N)) for t in grid]
    temperature = float(grid[int(np.argmin(losses))])
    return ClassHead(head.weight_CD / temperature, head.bias_C / temperature), temperature


def measure_head(
    layer: int, plain: ClassHead, tempered: ClassHead, temperature: float,
    states_ND: Tensor, label_N: Tensor,
) -> HeadQuality:  # fmt: skip
    """How well a head does, before and after its temperature, on texts it never saw."""
    before_NC, after_NC = (head(states_ND).softmax(-1).numpy() for head in (plain, tempered))
    labels = label_N.numpy()
    return HeadQuality(
        layer=layer,
        accuracy=float((after_NC.argmax(-1) == labels).mean()),
        error_before=calibration_error(before_NC, labels),
        error_after=calibration_error(after_NC, labels),
        temperature=temperature,
    )


def calibration_error(probs_NC: FloatArray, label_N: IndexArray) -> float:
    """Expected calibration error over 15 equal bins of the top probability (Guo et al. 2017)."""
    top_N = probs_NC.max(-1)
    right_N = probs_NC.argmax(-1) == label_N
    bin_N = np.minimum((top_N * BINS).astype(np.int64), BINS - 1)
    gaps = [
        abs(right_N[here].mean() - top_N[here].mean()) * here.mean()
        for here in (bin_N == each for each in np.unique(bin_N))
    ]
    return float(np.sum(gaps))
