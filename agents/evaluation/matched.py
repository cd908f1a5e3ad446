"""Savings at matched quality: what each family saves once it may lose no more than so much.

A family's operating point is the fastest on *validation* documents among those whose loss there is
within the target; if none is, it is full depth, which saves nothing. Each seed picks its own. What
the picks are worth is read on *test* documents, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.agents.evaluation.evaluation_rows import (
    Measured,
    TimeAndEnergy,
    time_and_energy,
    with_bounds,
)
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, METRICS, Metric, Scores
from offramp.agents.evaluation.statistics import Resample

TARGETS = (0.005, 0.01, 0.02, 0.05)
"""Shares of full depth's quality that may be lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedRow(TimeAndEnergy):
    """A family at one target loss: chosen on validation, measured on test.

    Attributes:
        policy: Name of the family.
        seeds: How many trainings it is the mean of; 1 for rules.
        target_loss: Share of full depth's quality that it might lose on validation.
        metric: Name of the quality that might be lost.
        quality, quality_full: The family's and full depth's, on test.
        loss, loss_low, loss_high: Relative loss on test, with its paired interval.
        mean_layers: Mean layers executed per token.
        agreement_offline: Agreement that replaying validation traces promised; None where some
            seed fell back to full depth, or the family was not replayed.
        agreement_online: Agreement that decoding kept.
        certified: Whether every pick carries a certificate.
        picks: Names of the operating points, one per seed.
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
    agreement_offline: float | None
    agreement_online: float
    certified: bool
    picks: tuple[str, ...]


Picks = dict[str, tuple[int, ...]]
"""Per family, an index into the measured policies for each seed."""

AllPicks = dict[tuple[str, float], Picks]
"""The picks for each metric, by name, and target loss."""


def quality_metrics(scores: Scores) -> list[Metric]:
    """What policies are chosen by: agreement and, where lines were completed, edit similarity."""
    return [metric for metric in (AGREEMENT, EDIT_SIMILARITY) if metric.is_measured(scores)]


def choose_all(measured: Sequence[Measured]) -> AllPicks:
    """The picks for every metric and target loss, full depth first among the measured."""
    return {
        (metric.name, target): choose(measured, metric, target)
        for metric in quality_metrics(measured[0].scores)
        for target in TARGETS
    }


def choose(measured: Sequence[Measured], metric: Metric, target_loss: float) -> Picks:
    """Per family and seed, the fastest operating point that keeps the target on validation.

    Full depth comes first among the measured, and whatever keeps the target must have been timed.
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
    """Median over documents of wall time over full depth's; a few disturbed runs do not move it."""
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
    """What a family's picks, one for each seed, are worth beside full depth on test documents."""
    scores = [run.scores for run in runs]
    draws = Resample.draw(len(runs), len(full.scores.tokens_D), seed)
    promised = [run.contender.offline_agreement for run in runs]
    return MatchedRow(
        policy=family,
        seeds=len(runs),
        target_loss=target_loss,
        metric=metric.name,
        quality=metric.of(scores),
        quality_full=metric.of([full.scores]),
        **with_bounds("loss", metric.estimate_loss(scores, full.scores, draws)),
        mean_layers=float(np.mean([each.mean_layers for each in scores])),
        agreement_offline=None if None in promised else float(np.mean(np.asarray(promised, float))),
        agreement_online=AGREEMENT.of(scores),
        certified=all(run.certified for run in runs),
        picks=tuple(run.contender.name for run in runs),
        **time_and_energy(runs, seed),
    )


def matched_rows(picks: AllPicks, test: Mapping[int, Measured], seed: int = 0) -> list[MatchedRow]:
    """Every family at every target loss, as its picks were measured on test documents."""
    return [
        matched_row(family, [test[k] for k in chosen], test[0], METRICS[name], target, seed)
        for (name, target), families in picks.items()
        if METRICS[name].is_measured(test[0].scores)
        for family, chosen in families.items()
    ]


def needed(picks: AllPicks) -> list[int]:
    """Every policy that some choice needs on test documents, full depth first."""
    return sorted({0, *(index for each in picks.values() for ks in each.values() for index in ks)})
