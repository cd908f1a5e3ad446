"""What is reported: one row per policy measured, and one per family at matched quality.

Shape suffixes: S seeds, D documents, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.energy_ratios import Metered
from offramp.agents.evaluation.scores import (
    ACCURACY,
    AGREEMENT,
    EDIT_SIMILARITY,
    EXACT_MATCH,
    PERPLEXITY,
    Metric,
    Scores,
)
from offramp.agents.evaluation.statistics import (
    Estimate,
    Floats,
    Resample,
    hypervolume,
    ratio,
    resampled,
    with_interval,
)
from offramp.agents.placing.contenders import Contender

REFERENCE_POINT = (1.0, 0.9)
"""Of the hypervolume: full depth's own time, and nine tenths of its quality."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of a policy, and of full depth beside it, per document; [D]."""

    mine_D: Floats
    full_D: Floats


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy on the documents of one split.

    Attributes:
        contender: The policy.
        seed: Of its training; None for rules.
        scores: What its output was worth.
        clock: What it took; None where time was not measured.
        certified: Whether its bundle carries a certificate.
        energy: Its joules, and how they were come by; None where nobody asked.
    """

    contender: Contender
    seed: int | None
    scores: Scores
    clock: Clock | None = None
    certified: bool = False
    energy: Metered | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One contender, measured on-policy. Intervals are 95 % by paired document bootstrap.

    Attributes:
        policy: Name with its operating point.
        family: Kind of policy.
        setting: Threshold, preference or layer; None for full depth.
        agreement: Share of tokens equal to those of full depth, same history.
        agreement_low, agreement_high: Its interval.
        accuracy: Share of tokens equal to the document's.
        mean_layers: Mean layers executed per token.
        wall_ratio: Wall time per token over that of KV-cached full depth, measured interleaved;
            None where only quality was measured.
        wall_ratio_low, wall_ratio_high: Its interval.
        us_per_token: Microseconds per token at batch 1.
        offline_agreement: What replaying the traces had promised.
        tokens: Tokens that quality was measured on.
        exits: Layers at which the policy is asked.
        depths: How many tokens left after each layer, by layer.
        perplexity: Of the documents' tokens, each at the layer it left from.
        edit_similarity, edit_similarity_low, edit_similarity_high: Of completed lines, in 0 … 1;
            None where no line was completed.
        exact_match: Share of completed lines that match.
        lines: Lines completed.
        seed: Of its training; None for rules.
        energy_ratio: Joules per token over full depth's, metered in the timed runs; None where
            they are unknown.
        energy_ratio_low, energy_ratio_high: Its interval.
        energy_method: How the joules were come by, or "unavailable"; None where nobody asked.
    """

    policy: str
    family: str
    setting: float | None
    agreement: float
    agreement_low: float
    agreement_high: float
    accuracy: float
    mean_layers: float
    wall_ratio: float | None
    wall_ratio_low: float | None
    wall_ratio_high: float | None
    us_per_token: float | None
    offline_agreement: float | None
    tokens: int
    exits: tuple[int, ...]
    depths: dict[int, int]
    perplexity: float | None = None
    edit_similarity: float | None = None
    edit_similarity_low: float | None = None
    edit_similarity_high: float | None = None
    exact_match: float | None = None
    lines: int = 0
    seed: int | None = None
    energy_ratio: float | None = None
    energy_ratio_low: float | None = None
    energy_ratio_high: float | None = None
    energy_method: str | None = None


def evaluation_row(measured: Measured, timed_tokens: int, seed: int = 0) -> EvaluationRow:
    """One policy's row.

    Args:
        measured: The policy's measurements.
        timed_tokens: Tokens timed in each document.
        seed: Of the bootstrap.
    """
    contender, scores = measured.contender, measured.scores
    draws = Resample.draw(1, len(scores.tokens_D), seed)
    agreement = AGREEMENT.estimate([scores], draws)
    wall, energy = wall_ratio([measured], seed), energy_ratio([measured], seed)
    has_lines = EDIT_SIMILARITY.is_measured(scores)
    edit = EDIT_SIMILARITY.estimate([scores], draws) if has_lines else None
    clock = measured.clock
    return EvaluationRow(
        policy=contender.name,
        family=contender.family,
        setting=contender.setting,
        agreement=agreement.value,
        agreement_low=agreement.low,
        agreement_high=agreement.high,
        accuracy=ACCURACY.of([scores]),
        mean_layers=scores.mean_layers,
        wall_ratio=wall.value if wall else None,
        wall_ratio_low=wall.low if wall else None,
        wall_ratio_high=wall.high if wall else None,
        us_per_token=1e6 * float(clock.mine_D.mean()) / timed_tokens if clock else None,
        offline_agreement=contender.offline_agreement,
        tokens=int(scores.tokens_D.sum()),
        exits=tuple(contender.policy.exits),
        depths=scores.depths,
        perplexity=PERPLEXITY.of([scores]),
        edit_similarity=edit.value if edit else None,
        edit_similarity_low=edit.low if edit else None,
        edit_similarity_high=edit.high if edit else None,
        exact_match=EXACT_MATCH.of([scores]) if has_lines else None,
        lines=int(scores.lines_D.sum()),
        seed=measured.seed,
        energy_ratio=energy.value if energy else None,
        energy_ratio_low=energy.low if energy else None,
        energy_ratio_high=energy.high if energy else None,
        energy_method=measured.energy.method.value if measured.energy else None,
    )


def wall_ratio(runs: Sequence[Measured], seed: int = 0) -> Estimate | None:
    """Wall time over full depth's: the mean over runs, its interval over runs and documents."""
    clocks = [run.clock for run in runs if run.clock is not None]
    if len(clocks) < len(runs):
        return None
    mine_SD = np.stack([clock.mine_D for clock in clocks])
    full_SD = np.stack([clock.full_D for clock in clocks])
    return ratio(mine_SD, full_SD, Resample.draw(len(runs), mine_SD.shape[1], seed))


def energy_ratio(runs: Sequence[Measured], seed: int = 0) -> Estimate | None:
    """Joules over full depth's, likewise; None where those of some run are unknown."""
    known = [run.energy.joules for run in runs if run.energy and run.energy.joules]
    if len(known) < len(runs):
        return None
    mine_SD, full_SD = (np.stack(side) for side in zip(*known, strict=True))
    return ratio(mine_SD, full_SD, Resample.draw(len(runs), mine_SD.shape[1], seed))


def frontier_volume(
    points: Sequence[Measured], full: Measured, metric: Metric, seed: int = 0
) -> Estimate:
    """Hypervolume of timed points: wall ratio against quality relative to full depth.

    Quality and time are resampled over the timed documents, which are the first of the split.
    """
    assert all(point.clock is not None for point in points)
    clocks = [point.clock for point in points if point.clock is not None]
    timed = len(clocks[0].mine_D)

    def volume(drawn_D: NDArray[np.int64]) -> float:
        cost_P = np.asarray([c.mine_D[drawn_D].sum() / c.full_D[drawn_D].sum() for c in clocks])
        quality_P = np.asarray([1 - _loss(point, full, metric, drawn_D) for point in points])
        return hypervolume(cost_P, quality_P, REFERENCE_POINT)

    whole = volume(np.arange(timed))
    return with_interval(whole, resampled(volume, timed, seed))


def _loss(point: Measured, full: Measured, metric: Metric, drawn_D: NDArray[np.int64]) -> float:
    mine, theirs = (_drawn(m.scores, drawn_D) for m in (point, full))
    if not metric.is_measured(theirs):
        return 1.0
    return metric.loss(metric.of([mine]), metric.of([theirs]))


def _drawn(scores: Scores, drawn_D: NDArray[np.int64]) -> Scores:
    plain = scores.plain()
    depths = plain.pop("depths")
    drawn = {name: np.asarray(column)[drawn_D] for name, column in plain.items()}
    return Scores.of({**drawn, "depths": depths})
