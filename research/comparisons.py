"""Who is ahead in a tournament, and how surely: the parts that it adds to a report.

Shape suffixes: S, R runs of either side, D documents, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.page import frontier_point
from offramp.agents.evaluation.plots import FrontierPoint
from offramp.agents.evaluation.protocol import Findings
from offramp.agents.evaluation.report import Section, Table
from offramp.agents.evaluation.scores import Metric
from offramp.agents.evaluation.statistics import (
    RESAMPLES,
    Estimate,
    Floats,
    Resample,
    draw_counts,
    with_interval,
)

BENCHMARK_KEYS = (
    "policy", "seeds", "target_loss", "metric", "quality", "quality_full", "mean_layers",
    "wall_ratio", "wall_ratio_low", "wall_ratio_high", "agreement_offline", "agreement_online",
    "certified",
)  # fmt: skip
"""What the benchmark prints of a row, in this order."""


def comparisons(
    runs: Mapping[str, Sequence[Measured]], pairs: Sequence[tuple[str, str]]
) -> Section:
    """Pairs of families at one target: who takes less time, and how surely.

    Args:
        runs: Each family's picks, measured on test documents.
        pairs: Names of two families each; those that did not take part are left out.
    """
    rows = []
    for mine, theirs in pairs:
        if mine not in runs or theirs not in runs:
            continue
        apart = time_difference(runs[mine], runs[theirs])
        chance = saves_more(runs[mine], runs[theirs])
        rows.append(
            (
                f"{mine} – {theirs}",
                f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]",
                f"{chance.value:.2f} [{chance.low:.2f}, {chance.high:.2f}]",
            )
        )
    text = (
        "Difference of wall ratios (below 0: the first is faster), and the probability that a run "
        "of the first takes less time than one of the second on a document (Agarwal et al. 2021; "
        "0.5: as often as not)."
    )
    head = ("pair", "difference of wall ratios", "P(first is faster)")
    return Section("Who is ahead at matched quality", text, table=Table(head, rows))


def matched_points(findings: Findings, metrics: Sequence[Metric]) -> dict[str, list[FrontierPoint]]:
    """Everything picked for any target, on test documents; each point the mean over its seeds."""
    groups = {
        (family, picked): [findings.test[index] for index in picked]
        for families in findings.picks.values()
        for family, picked in families.items()
        if any(picked)
    }
    full = findings.test[0]
    return {
        metric.name: [
            replace(frontier_point(runs, full, metric), family=family)
            for (family, _), runs in groups.items()
        ]
        for metric in metrics
        if metric.is_measured(full.scores)
    }


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


def probability_of_improvement(mine_SD: Floats, theirs_RD: Floats) -> float:
    """P(a run of mine beats one of theirs on a document), averaged over documents.

    Higher is better; ties count half: the Mann–Whitney statistic over all pairs of runs, per
    document (Agarwal et al. 2021, §4.3, with documents as the tasks).

    Args:
        mine_SD: Scores of S runs.
        theirs_RD: Scores of R runs on the same documents.
    """
    return float(_wins(mine_SD, theirs_RD).mean())


def improvement(mine_SD: Floats, theirs_RD: Floats, seed: int = 0) -> Estimate:
    """``probability_of_improvement`` with its interval over runs and documents."""
    rng = np.random.default_rng(seed)
    (runs, documents), others = mine_SD.shape, len(theirs_RD)
    win_SRD = _wins(mine_SD, theirs_RD)
    count_BS = draw_counts(rng.integers(runs, size=(RESAMPLES, runs)), runs)
    count_BR = draw_counts(rng.integers(others, size=(RESAMPLES, others)), others)
    count_BD = draw_counts(rng.integers(documents, size=(RESAMPLES, documents)), documents)
    totals_B = np.einsum("bs,br,bd,srd->b", count_BS, count_BR, count_BD, win_SRD, optimize=True)
    return with_interval(probability_of_improvement(mine_SD, theirs_RD), totals_B / win_SRD.size)


def _wins(mine_SD: Floats, theirs_RD: Floats) -> Floats:
    """1 where mine is higher, ½ where they are equal, [S, R, D]."""
    difference_SRD = mine_SD[:, None] - theirs_RD[None]
    return np.asarray((difference_SRD > 0) + 0.5 * (difference_SRD == 0))


def benchmark_row(row: MatchedRow) -> dict[str, Any]:
    """The keys of a row that the benchmark prints, in its order."""
    return {key: getattr(row, key) for key in BENCHMARK_KEYS}
