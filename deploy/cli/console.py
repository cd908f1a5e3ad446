"""What the command line shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

NARROWEST = 110
"""Columns that tables need; a pipe reports 80."""

TOLD_EVERY_S = 30.0
"""Seconds between two lines on how far a command is, where there is no bar to watch."""

console = Console(highlight=False)
"""Where commands print."""

if not console.is_terminal:
    console = Console(highlight=False, width=NARROWEST)


def say(text: str | Text) -> None:
    """Print a sentence whole: a terminal wraps it, a pipe or a file gets one line."""
    console.print(text, soft_wrap=True)


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, stage: str = "", said: str = "") -> None:
        """Show how much is done.

        Args:
            done: Units done so far.
            total: Units in all.
            stage: What they are units of, if there are several: each stage has a bar of its own.
            said: What else is to be said so far.
        """
        ...


@contextlib.contextmanager
def progress(label: str, unit: str, **others: str) -> Iterator[Advance]:
    """Show progress bars while the block runs, with rate and time left; yields what moves them.

    Where no terminal shows bars, a line says the same every half minute.

    Args:
        label: Names the first bar until a stage does.
        unit: What is counted; "" shows no rate.
        others: What stages count that count something else, by their names with ``_`` for spaces.
    """
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}
        begun: dict[str, int] = {}
        first = bar.add_task(label, total=None, rate="", said="")
        told_s = time.monotonic()

        def advance(done: int, total: int, stage: str = "", said: str = "") -> None:
            nonlocal told_s
            if stage not in tasks:
                # The bar that was there before anything was told becomes the first stage's.
                tasks[stage] = bar.add_task(stage, total=None, rate="", said="") if tasks else first
                bar.update(tasks[stage], description=stage or label)
                # What an earlier run did took none of this one's time.
                bar.reset(tasks[stage], completed=done, total=total)
                begun[stage] = done
            task = next(each for each in bar.tasks if each.id == tasks[stage])
            elapsed, new = task.elapsed or 0.0, done - begun[stage]
            counted = others.get(stage.replace(" ", "_"), unit)
            rate = f"{new / elapsed:,.0f} {counted}/s" if elapsed > 0 and counted else ""
            bar.update(task.id, completed=done, total=total, rate=rate, said=said)
            if not console.is_terminal and time.monotonic() > told_s + TOLD_EVERY_S:
                told_s = time.monotonic()
                left = f"about {elapsed * (total - done) / new:,.0f} s" if new else "unknown time"
                say(f"  {stage or label}: {done:,} of {total:,}, {left} left{said and '; '}{said}")

        yield advance


@contextlib.contextmanager
def keeping(out: Path, then: str = "the same command goes on") -> Iterator[None]:
    """Say, if the block is cut off (Ctrl-C, SIGTERM), that what is done is kept, if it is."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if out.exists():
            say(f"[yellow]cut off[/] {out} keeps what is done; {then}")
        raise
