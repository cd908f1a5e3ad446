"""The parts of a report that a tournament adds: who is ahead, and what was picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from offramp.agents.evaluation.matched import saves_more, time_difference
from offramp.agents.evaluation.page import frontier_point
from offramp.agents.evaluation.plots import Point
from offramp.agents.evaluation.report import Section, Table
from offramp.agents.evaluation.rows import Measured
from offramp.agents.evaluation.scores import Metric
from offramp.research.tournament import Outcome


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


def matched_points(outcome: Outcome, metrics: Sequence[Metric]) -> dict[str, list[Point]]:
    """Everything picked for any target, on test documents; each point the mean over its seeds."""
    groups = {
        (family, picked): [outcome.test[index] for index in picked]
        for families in outcome.picks.values()
        for family, picked in families.items()
        if any(picked)
    }
    full = outcome.test[0]
    return {
        metric.name: [
            replace(frontier_point(runs, full, metric), family=family)
            for (family, _), runs in groups.items()
        ]
        for metric in metrics
        if metric.is_measured(full.scores)
    }
