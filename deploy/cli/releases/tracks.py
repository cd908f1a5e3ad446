"""Shows what the releases that run now did, all workers together."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from offramp.controller.release.registry import Ack
from offramp.controller.watching.analysis import LATE
from offramp.controller.watching.intervals import interval
from offramp.controller.watching.quantiles import quantile_s
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally, add_up

CONFIDENCE = Steps().confidence
"""Probability that the intervals shown hold at every look."""

UNKNOWN = "–"
"""What stands where nothing has been counted yet, or nothing is to be told."""

COLUMNS_OF_TRACKS = (
    "generation",
    "workers",
    "tokens",
    "tokens/s",
    "first, gap p99 ms",
    "layers/token",
    "mJ/token",
    "failures",
    "audited",
    f"disagreed ({CONFIDENCE:.0%})",
)
"""What a line about a running release says."""


def points_of(ack: Ack) -> str:
    """At which certified settings a worker's releases run, where they may move: "2 of 5"."""
    return ", ".join(f"{each.point} of {each.points}" for each in ack.tallies if each.points)


def tracks_table(acks: Sequence[Ack]) -> Table:
    """A row per release that some worker runs: the stable one, and a canary beside it."""
    table = Table(*COLUMNS_OF_TRACKS)
    for row in track_rows(acks):
        table.add_row(*row)
    return table


def track_rows(acks: Sequence[Ack]) -> list[tuple[str, ...]]:
    """What the requests of each running release did, as cells of COLUMNS_OF_TRACKS."""
    tallies = [each for ack in acks for each in ack.tallies]
    rows = []
    for generation in sorted({each.generation for each in tallies}):
        workers = sum(each.generation == generation for each in tallies)
        rows.append((str(generation), str(workers), *_cells(add_up(generation, tallies))))
    return rows


def _cells(tally: Tally) -> tuple[str, ...]:
    return (
        str(tally.tokens),
        f"{tally.speed:.1f}",
        f"{_late_ms(tally.firsts)}, {_late_ms(tally.gaps)}",
        f"{tally.depth:.1f}",
        _energy(tally),
        str(tally.failures),
        str(tally.audited),
        _disagreed(tally),
    )


def _late_ms(counts: Sequence[int]) -> str:
    return f"{1e3 * quantile_s(counts, LATE):.3g}" if sum(counts) else UNKNOWN


def _energy(tally: Tally) -> str:
    """Millijoules and how they were come by: a bare number of joules says nothing."""
    return UNKNOWN if tally.token_j is None else f"{1e3 * tally.token_j:.3g} ({tally.meter})"


def _disagreed(tally: Tally) -> str:
    if tally.is_lossless:
        return "lossless"
    if tally.audited == 0:
        return UNKNOWN
    least, most = interval(tally.disagreed, tally.audited, CONFIDENCE)
    return f"{least:.1%} to {most:.1%}"
