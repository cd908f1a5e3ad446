"""What the command line shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

NARROWEST = 110
"""Columns that tables need; a pipe reports 80."""

console = Console(highlight=False)
"""Where commands print."""

if not console.is_terminal:
    console = Console(highlight=False, width=NARROWEST)


def say(text: str | Text) -> None:
    """Print a sentence whole: a terminal wraps it, a pipe or a file gets one line."""
    console.print(text, soft_wrap=True)


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, stage: str = "") -> None:
        """Show how much is done.

        Args:
            done: Units done so far.
            total: Units in all.
            stage: What they are units of, if there are several: each stage has a bar of its own.
        """
        ...


@contextlib.contextmanager
def progress(label: str, unit: str) -> Iterator[Advance]:
    """Show progress bars with a rate while the block runs; yields what moves them."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}
        first = bar.add_task(label, total=None, rate="")

        def advance(done: int, total: int, stage: str = "") -> None:
            if stage not in tasks:
                # The bar that was there before anything was told becomes the first stage's.
                tasks[stage] = bar.add_task(stage, total=None, rate="") if tasks else first
                bar.update(tasks[stage], description=stage or label)
            task = tasks[stage]
            elapsed = next(each.elapsed for each in bar.tasks if each.id == task) or 0.0
            rate = f"{done / elapsed:,.0f} {unit}/s" if elapsed > 0 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance
