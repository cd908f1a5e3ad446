"""Run ``offramp tune --task classify``: fit a head per exit, and show what it came to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import ClassifyReport, tune_classes
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress

TOKENS, CLASSIFY = "tokens", "classify"
"""What ``offramp tune`` fits exits for."""


def tune_heads(given: dict[str, Any], out: Path, resume: bool) -> None:
    """Fit heads from what was typed of the options that mean something to them.

    Raises:
        ConfigError: there is no data, or an option is unusable.
        TraceError, ModelError: the data or the model are.
    """
    given = {"model": options.DEFAULT_MODEL} | given
    given["exits"] = options.parse_layers("exits", given.get("exits", ""))
    if given.get("data") is None:
        raise ConfigError("data", "is missing", "Name a .csv or .jsonl file of texts with labels")
    names = given.keys() - {"out", "task", "resume"}
    config = ClassifyTuneConfig(**{name: given[name] for name in names})
    if not resume:
        options.require_new_folder("out", out)
    with keeping(out, "--resume goes on"), progress("states", "texts", heads="heads") as advance:
        report = tune_classes(
            config,
            out,
            resume=resume,
            on_progress=lambda stage, done, total: advance(done, total, stage),
        )
    console.print(heads_table(report))
    console.print(
        f"{report.classes} classes, {report.learned:,} texts learned from, "
        f"{report.measured:,} measured on → {out}"
    )


def heads_table(report: ClassifyReport) -> Table:
    """Each exit's accuracy and calibration error, before → after its temperature."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("exit", "accuracy", "calibration error", "temperature"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in enumerate(report.rows):
        table.add_row(
            "full" if place == len(report.rows) - 1 else str(row.layer),
            f"{row.accuracy:.3f}",
            f"{row.error_before:.3f} → {row.error_after:.3f}",
            f"{row.temperature:.2f}",
        )
    return table
