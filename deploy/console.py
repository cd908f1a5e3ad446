"""What the command line shows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from offramp.agents.evaluate import EvaluationRow

console = Console(highlight=False)
"""Where commands print."""

Advance = Callable[[int, int], None]
"""Told (done so far, in all)."""


@contextlib.contextmanager
def progress(label: str, unit: str) -> Iterator[Advance]:
    """A progress bar with a rate; yields what to call with (done, total)."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=None, rate="")

        def advance(done: int, total: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{done / elapsed:,.0f} {unit}/s" if elapsed > 0 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


def evaluation_table(rows: Sequence[EvaluationRow], chosen: str) -> Table:
    """The table of an evaluation; the published policy is marked."""
    table = Table(title="Held-out documents, on-policy, batch 1", title_justify="left")
    table.add_column("policy")
    table.add_column("agreement", justify="right")
    table.add_column("replay promised", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("mean layers", justify="right")
    table.add_column("wall time ratio", justify="right")
    for row in rows:
        name = f"{row.policy}  ← published" if row.policy == chosen else row.policy
        promised = "" if row.offline_agreement is None else f"{row.offline_agreement:.3f}"
        table.add_row(
            name,
            f"{row.agreement:.3f} [{row.agreement_low:.3f}, {row.agreement_high:.3f}]",
            promised,
            f"{row.accuracy:.3f}",
            f"{row.mean_layers:.2f}",
            _interval(row.wall_ratio, row.wall_ratio_low, row.wall_ratio_high),
            style="bold" if row.policy == chosen else None,
        )
    return table


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
