"""Run ``offramp drift``: is what is decoded now still like what policies were trained on?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.agents.recording.drift import find_drift
from offramp.deploy.cli.console import console
from offramp.envs.traces.store import TraceStore

DRIFTED = 3
"""Exit status for a difference that is no chance; errors have 1 and 2."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("drift")(drift)


def drift(
    traces: Annotated[Path, typer.Argument(help="A recording of now, by `offramp record`.")],
    against: Annotated[Path, typer.Option(help="The recording that policies were trained on.")],
    false_alarms: Annotated[
        float, typer.Option(min=0.002, max=0.5, help="Chance of an alarm if nothing changed.")
    ] = 0.01,
) -> None:
    """Compare the features of two recordings; exit status 3 if they differ beyond chance."""
    before = TraceStore.open(against).read("train")
    found = find_drift(before, TraceStore.open(traces).read())
    first, second = found.document_counts
    has_drifted = found.p_value <= false_alarms
    verdict = "they differ beyond chance" if has_drifted else "no difference beyond chance"
    console.print(
        f"{verdict}: p = {found.p_value:.3g}, over {first} and {second} documents; most at "
        f"{found.column}, by {found.distance:.2f} (Kolmogorov-Smirnov)"
    )
    if has_drifted:
        raise typer.Exit(DRIFTED)
