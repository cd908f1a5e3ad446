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


def tracks_table(acks: Sequence[Ack]) -> Table:
    """A row per release that some worker runs: the stable one, and a canary beside it."""
    columns = ("generation", "workers", "tokens", "tokens/s", "first, gap p99 ms", "layers/token")
    table = Table(*columns, "failures", "audited", f"disagreed ({CONFIDENCE:.0%})")
    tallies = [each for ack in acks for each in ack.tallies]
    for generation in sorted({each.generation for each in tallies}):
        workers = sum(each.generation == generation for each in tallies)
        table.add_row(str(generation), str(workers), *_cells(add_up(generation, tallies)))
    return table


def _cells(tally: Tally) -> tuple[str, ...]:
    least, most = interval(tally.disagreed, tally.audited, CONFIDENCE)
    return (
        str(tally.tokens),
        f"{tally.speed:.1f}",
        f"{1e3 * quantile_s(tally.firsts, LATE):.3g}, {1e3 * quantile_s(tally.gaps, LATE):.3g}",
        f"{tally.depth:.1f}",
        str(tally.failures),
        str(tally.audited),
        "lossless" if tally.is_lossless else f"{least:.1%} to {most:.1%}",
    )
