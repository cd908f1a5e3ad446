"""What a policy's output was worth, document by document, and the metrics that are read off it.

Shape suffixes: D documents, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.statistics import Estimate, Floats, Resample, with_interval
from offramp.controller.errors import ConfigError

SUMS = ("tokens", "agreeing", "right", "surprisal", "lines", "exact", "similarity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Sums over the tokens and lines of each of D documents.

    Attributes:
        tokens_D: Tokens decoded, teacher-forced.
        agreeing_D: Tokens equal to full depth's, which has the same history.
        right_D: Tokens equal to the document's.
        surprisal_D: −log p of the document's tokens at the layer each left from, nats.
        lines_D: Lines that were completed.
        exact_D: Lines that match the document's.
        similarity_D: Edit similarities of the lines, each in 0 … 1.
        depths: How many teacher-forced tokens left after each layer.
    """

    tokens_D: Floats
    agreeing_D: Floats
    right_D: Floats
    surprisal_D: Floats
    lines_D: Floats
    exact_D: Floats
    similarity_D: Floats
    depths: dict[int, int] = field(default_factory=dict)

    @property
    def mean_layers(self) -> float:
        """Mean layers executed per token."""
        return sum(k * n for k, n in self.depths.items()) / sum(self.depths.values())


@dataclass(frozen=True, slots=True)
class Metric:
    """A quality: a ratio of two sums.

    Attributes:
        name: What JSON files call it.
        label: What readers are told it is.
        above, below: The sums of ``Scores`` that are divided.
        is_perplexity: Whether lower is better, and the ratio goes through exp.
    """

    name: str
    label: str
    above: str
    below: str
    is_perplexity: bool = False

    def of(self, runs: Sequence[Scores]) -> float:
        """Mean over seeds of the metric."""
        above_SD, below_SD = self._stack(runs)
        return float(self._read(above_SD.sum(1) / below_SD.sum(1)).mean())

    def estimate(self, runs: Sequence[Scores], draws: Resample) -> Estimate:
        """The metric with its interval over seeds and documents."""
        sampled_B = self._sample(runs, draws).mean(1)
        return with_interval(self.of(runs), sampled_B)

    def over(self, scores: Scores, drawn_D: NDArray[np.int64]) -> float:
        """The metric of one run over drawn documents; NaN where they hold nothing to divide by."""
        above_SD, below_SD = self._stack([scores])
        with np.errstate(invalid="ignore"):
            return float(self._read(above_SD[0, drawn_D].sum() / below_SD[0, drawn_D].sum()))

    def loss(self, value: float, full: float) -> float:
        """Share of full depth's quality that is lost; of perplexity, the relative rise."""
        return value / full - 1 if self.is_perplexity else 1 - value / full

    def estimate_loss(self, runs: Sequence[Scores], full: Scores, draws: Resample) -> Estimate:
        """The relative loss against full depth, paired by document, with its interval."""
        mine_B = self._sample(runs, draws).mean(1)
        theirs_BS = self._sample([full] * len(runs), draws)
        sampled = [self.loss(*pair) for pair in zip(mine_B, theirs_BS[:, 0], strict=True)]
        return with_interval(self.loss(self.of(runs), self.of([full])), np.asarray(sampled))

    def is_measured(self, scores: Scores) -> bool:
        """Whether there is anything to divide by."""
        return bool(getattr(scores, f"{self.below}_D").sum() > 0)

    def _stack(self, runs: Sequence[Scores]) -> tuple[Floats, Floats]:
        above_SD = np.stack([getattr(run, f"{self.above}_D") for run in runs])
        return above_SD, np.stack([getattr(run, f"{self.below}_D") for run in runs])

    def _sample(self, runs: Sequence[Scores], draws: Resample) -> Floats:
        above_SD, below_SD = self._stack(runs)
        with np.errstate(invalid="ignore"):
            return self._read(draws.sums(above_SD) / draws.sums(below_SD))

    def _read(self, ratio: Floats) -> Floats:
        return np.exp(ratio) if self.is_perplexity else ratio


AGREEMENT = Metric("agreement", "token agreement with full depth", "agreeing", "tokens")
ACCURACY = Metric("accuracy", "next-token accuracy", "right", "tokens")
PERPLEXITY = Metric("perplexity", "perplexity", "surprisal", "tokens", is_perplexity=True)
EXACT_MATCH = Metric("exact_match", "line-completion exact match", "exact", "lines")
EDIT_SIMILARITY = Metric(
    "edit_similarity", "line-completion edit similarity", "similarity", "lines"
)
METRICS = {
    metric.name: metric
    for metric in (AGREEMENT, ACCURACY, PERPLEXITY, EXACT_MATCH, EDIT_SIMILARITY)
}


def require_finite(scores: Scores, policy: str) -> None:
    """Refuse sums that are not numbers: a broken model must not become a report.

    Raises:
        ConfigError: naming the sum.
    """
    for name in SUMS:
        if not all(map(math.isfinite, getattr(scores, f"{name}_D"))):
            raise ConfigError("model", f"gives {name} that is not finite under {policy}")
