"""Savings at matched quality: what each family saves once it may lose no more than so much.

A family's operating point is the fastest on *validation* documents among those whose loss there is
within the target; if none is, it is full depth, which saves nothing. Each seed picks its own. What
the picks are worth is read on *test* documents, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offramp.agents.evaluation.rows import Measured, energy_ratio, wall_ratio
from offramp.agents.evaluation.scores import AGREEMENT, Metric
from offramp.agents.evaluation.statistics import (
    Estimate,
    Resample,
    improvement,
    with_interval,
)

TARGETS = (0.005, 0.01, 0.02, 0.05)
"""Shares of full depth's quality that may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedRow:
    """A family at one target loss: chosen on validation, measured on test.

    Attributes:
        policy: The family.
        seeds: How many trainings it is the mean of; 1 for rules.
        target_loss: Share of full depth's quality that it might lose on validation.
        metric: Which quality.
        quality, quality_full: The family's and full depth's, on test.
        loss, loss_low, loss_high: Relative loss on test, with its paired interval.
        mean_layers: Mean layers executed per token.
        wall_ratio: Wall time per token over KV-cached full depth's; below 1 is a saving.
        wall_ratio_low, wall_ratio_high: Its interval over seeds and documents.
        agreement_offline: Agreement that replaying validation traces promised; None where some
            seed fell back to full depth, or the family was not replayed.
        agreement_online: Agreement decoded.
        certified: Whether every pick carries a certificate.
        picks: Names of the operating points, one per seed.
        energy_ratio: Joules per token over full depth's; None where nothing measured them.
        energy_ratio_low, energy_ratio_high: Its interval over seeds and documents.
        energy_method: How; None where nobody asked.
    """

    policy: str
    seeds: int
    target_loss: float
    metric: str
    quality: float
    quality_full: float
    loss: float
    loss_low: float
    loss_high: float
    mean_layers: float
    wall_ratio: float | None
    wall_ratio_low: float | None
    wall_ratio_high: float | None
    agreement_offline: float | None
    agreement_online: float
    certified: bool
    picks: tuple[str, ...]
    energy_ratio: float | None = None
    energy_ratio_low: float | None = None
    energy_ratio_high: float | None = None
    energy_method: str | None = None

    def benchmark_row(self) -> dict[str, Any]:
        """The keys that the benchmark prints."""
        return {key: value for key, value in asdict(self).items() if key in BENCHMARK_KEYS}


BENCHMARK_KEYS = (
    "policy", "seeds", "target_loss", "metric", "quality", "quality_full", "mean_layers",
    "wall_ratio", "wall_ratio_low", "wall_ratio_high", "agreement_offline", "agreement_online",
    "certified",
)  # fmt: skip

Picks = dict[str, tuple[int, ...]]
"""Per family, an index into the measured policies for each seed."""


def choose(measured: Sequence[Measured], metric: Metric, target_loss: float) -> Picks:
    """Per family and seed, the fastest operating point that keeps the target on validation.

    Args:
        measured: Full depth first; timed, on validation documents.
        metric: What may be lost.
        target_loss: Share of it that may be.
    """
    full = metric.of([measured[0].scores])
    groups: dict[str, dict[int | None, list[int]]] = {}
    for index, each in enumerate(measured[1:], 1):
        groups.setdefault(each.contender.family, {}).setdefault(each.seed, []).append(index)

    def fastest(indices: Iterable[int]) -> int:
        keeping = [
            index
            for index in indices
            if metric.loss(metric.of([measured[index].scores]), full) <= target_loss
        ]
        # Full depth is everyone's last resort, and better than an exit that costs more.
        return min([0, *keeping], key=lambda index: typical_ratio(measured[index]))

    return {
        family: tuple(fastest(indices) for indices in by_seed.values())
        for family, by_seed in groups.items()
    }


def typical_ratio(measured: Measured) -> float:
    """The median over documents of wall time over full depth's: deaf to a few disturbances."""
    assert measured.clock is not None
    return float(np.median(measured.clock.mine_D / measured.clock.full_D))


def matched_row(
    family: str,
    runs: Sequence[Measured],
    full: Measured,
    metric: Metric,
    target_loss: float,
    seed: int = 0,
) -> MatchedRow:
    """What a family's picks are worth on test documents.

    Args:
        family: Its name.
        runs: The pick of each seed.
        full: Full depth on the same documents.
        metric: What might be lost.
        target_loss: Share of it that might be.
        seed: Of the bootstrap.
    """
    scores = [run.scores for run in runs]
    draws = Resample.draw(len(runs), len(full.scores.tokens_D), seed)
    loss = metric.estimate_loss(scores, full.scores, draws)
    wall, energy = wall_ratio(runs, seed), energy_ratio(runs, seed)
    promised = [run.contender.offline_agreement for run in runs]
    return MatchedRow(
        policy=family,
        seeds=len(runs),
        target_loss=target_loss,
        metric=metric.name,
        quality=metric.of(scores),
        quality_full=metric.of([full.scores]),
        loss=loss.value,
        loss_low=loss.low,
        loss_high=loss.high,
        mean_layers=float(np.mean([each.mean_layers for each in scores])),
        wall_ratio=wall.value if wall else None,
        wall_ratio_low=wall.low if wall else None,
        wall_ratio_high=wall.high if wall else None,
        agreement_offline=None if None in promised else float(np.mean(np.asarray(promised, float))),
        agreement_online=AGREEMENT.of(scores),
        certified=all(run.certified for run in runs),
        picks=tuple(run.contender.name for run in runs),
        energy_ratio=energy.value if energy else None,
        energy_ratio_low=energy.low if energy else None,
        energy_ratio_high=energy.high if energy else None,
        energy_method=runs[0].energy.method.value if runs[0].energy else None,
    )


def saves_more(mine: Sequence[Measured], theirs: Sequence[Measured], seed: int = 0) -> Estimate:
    """Probability that a run of mine takes less time than one of theirs on a document.

    Both at their operating points for one target; each relative to full depth beside it.
    """
    return improvement(-_ratios(mine), -_ratios(theirs), seed)


def time_difference(
    mine: Sequence[Measured], theirs: Sequence[Measured], seed: int = 0
) -> Estimate:
    """Mean wall ratio of mine minus theirs, paired by document; below 0: mine are faster.

    Seeds of either side are drawn apart, documents together.
    """
    documents = min(len(run.clock.mine_D) for run in (*mine, *theirs) if run.clock is not None)
    draws = [Resample.draw(len(runs), documents, seed) for runs in (mine, theirs)]
    values, samples = [], []
    for runs, drawn in zip((mine, theirs), draws, strict=True):
        clocks = [run.clock for run in runs if run.clock is not None]
        mine_SD = np.stack([clock.mine_D for clock in clocks])
        full_SD = np.stack([clock.full_D for clock in clocks])
        values.append((mine_SD.sum(1) / full_SD.sum(1)).mean())
        samples.append((drawn.sums(mine_SD) / drawn.sums(full_SD)).mean(1))
    return with_interval(float(values[0] - values[1]), samples[0] - samples[1])


def _ratios(runs: Sequence[Measured]) -> np.ndarray:
    clocks = [run.clock for run in runs if run.clock is not None]
    assert len(clocks) == len(runs)
    return np.stack([clock.mine_D / clock.full_D for clock in clocks])


def needed(picks: Mapping[Any, Picks]) -> list[int]:
    """Every policy that some choice needs on test documents, full depth first."""
    return sorted({0, *(index for each in picks.values() for ks in each.values() for index in ks)})
