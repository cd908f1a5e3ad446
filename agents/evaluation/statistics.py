"""Intervals and aggregates over documents and seeds.

Documents and seeds are resampled whole and paired: what is compared keeps its document. All
intervals are 95 %, percentile bootstrap (Efron 1979).

Shape suffixes: S seeds, D documents, B bootstrap resamples, P points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""How many resamples a bootstrap draws."""

LEVEL = 0.95
"""Coverage of every interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Resample:
    """Bootstrap draws that every compared quantity shares.

    Attributes:
        seeds_BS: The seeds that each resample drew.
        documents_BD: The documents that each resample drew.
    """

    seeds_BS: NDArray[np.int64]
    documents_BD: NDArray[np.int64]

    @classmethod
    def draw(cls, seeds: int, documents: int, seed: int = 0) -> Resample:
        """Draw seeds and documents, each with replacement, independently of one another.

        Policies trained from several seeds are as many runs on the same documents (a crossed
        design), so both are resampled; with one seed only documents vary.
        """
        rng = np.random.default_rng(seed)
        # Documents first: their draws are the same whatever the number of seeds.
        documents_BD = rng.integers(documents, size=(RESAMPLES, documents))
        return cls(rng.integers(seeds, size=(RESAMPLES, seeds)), documents_BD)

    def sums(self, values_SD: Floats) -> Floats:
        """Each resample's sum over its documents, for each of its seeds; [B, S]."""
        count_BD = draw_counts(self.documents_BD, values_SD.shape[1])
        sums_BS = count_BD @ values_SD.T
        return np.take_along_axis(sums_BS, self.seeds_BS, axis=1)


def ratio(above_SD: Floats, below_SD: Floats, draws: Resample) -> Estimate:
    """Mean over seeds of Σ above / Σ below over documents, such as seconds over full depth's."""
    value = (above_SD.sum(1) / below_SD.sum(1)).mean()
    sampled_B = (draws.sums(above_SD) / draws.sums(below_SD)).mean(1)
    return with_interval(float(value), sampled_B)


def with_interval(value: float, sampled_B: Floats) -> Estimate:
    """A value with the percentile interval of its resamples; those not finite are left out."""
    # A resample may draw only documents without a line: nothing to divide by.
    finite = sampled_B[np.isfinite(sampled_B)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def bootstrap_ratio(above_D: Floats, below_D: Floats, seed: int = 0) -> Estimate:
    """Σ above / Σ below over documents of one run, with its interval."""
    return ratio(above_D[None], below_D[None], Resample.draw(1, len(above_D), seed))


def hypervolume(cost_P: Floats, quality_P: Floats, reference: tuple[float, float]) -> float:
    """Area that points dominate within a reference point's corner, as a share of that corner.

    A point dominates what costs more and is worth less. The corner spans costs from 0 to the
    reference's and qualities from the reference's to 1 (Zitzler & Thiele 1999, in two
    dimensions: the area of a staircase).

    Args:
        cost_P: Costs, lower is better, such as wall time relative to full depth.
        quality_P: Qualities, higher is better, such as quality relative to full depth.
        reference: The cost and the quality that a point must improve on to count.
    """
    worst_cost, worst_quality = reference
    area, reached = 0.0, worst_quality
    for index in np.lexsort((-quality_P, cost_P)):
        cost, quality = cost_P[index], min(quality_P[index], 1.0)
        if cost < worst_cost and quality > reached:
            area += (worst_cost - cost) * (quality - reached)
            reached = quality
    return float(area / (worst_cost * (1 - worst_quality)))


def resampled(statistic: Callable[[NDArray[np.int64]], float], documents: int, seed: int) -> Floats:
    """A statistic of documents, recomputed on each resample of them; [B / 10]."""
    rng = np.random.default_rng(seed)
    draws = rng.integers(documents, size=(RESAMPLES // 10, documents))
    return np.asarray([statistic(draw_D) for draw_D in draws])


def draw_counts(drawn_BK: NDArray[np.int64], things: int) -> Floats:
    """How often each thing was drawn, per resample; [B, things]."""
    count = np.zeros((len(drawn_BK), things))
    np.add.at(count, (np.arange(len(drawn_BK))[:, None], drawn_BK), 1.0)
    return count
