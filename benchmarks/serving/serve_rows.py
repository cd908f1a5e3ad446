"""Rows of the serving benchmark, and how they are kept and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class ServeRow:
    """One figure.

    Attributes:
        what: What was measured.
        streams: Requests at a time; 0 where it does not apply.
        value: What the server reached.
        baseline: What it is held against; None where there is nothing.
        ratio: The value over the baseline: where both ran in turns, the median over rounds.
        unit: The unit of value and baseline.
    """

    what: str
    streams: int
    value: float
    baseline: float | None
    ratio: float | None
    unit: str


def row(
    what: str, streams: int, value: float, unit: str, baseline: float | None = None
) -> ServeRow:
    """A row whose ratio is that of its two figures."""
    ratio = value / baseline if baseline else None
    return ServeRow(what, streams, value, baseline, ratio, unit)


def paired(
    what: str, streams: int, values: Sequence[float], baselines: Sequence[float], unit: str
) -> ServeRow:
    """A row of rounds in turns: neighbours in time are compared, as a machine drifts."""
    ratios = [one / other for one, other in zip(values, baselines, strict=True)]
    value, baseline, ratio = (float(np.median(each)) for each in (values, baselines, ratios))
    return ServeRow(what, streams, value, baseline, ratio, unit)


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile in milliseconds; nan of nothing."""
    return float(np.percentile(seconds, 99)) * 1e3 if len(seconds) else math.nan


def p50(seconds: Sequence[float]) -> float:
    """The median in milliseconds; nan of nothing."""
    return float(np.median(seconds)) * 1e3 if len(seconds) else math.nan


def keep_rows(path: Path, rows: Sequence[ServeRow], conditions: dict[str, Any]) -> None:
    """Write all rows, and under which conditions they came about."""
    content = {"conditions": conditions, "rows": [_plain(each) for each in rows]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(each: ServeRow) -> dict[str, Any]:
    # JSON has no nan: what was not reached is null.
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(each).items()
    }


def show_rows(rows: Sequence[ServeRow]) -> None:
    """Print rows as a table."""
    table = Table("what", "streams", "value", "baseline", "ratio", "unit")
    for each in rows:
        figures = (each.value, each.baseline, each.ratio)
        table.add_row(
            each.what,
            str(each.streams or ""),
            *("" if number is None else f"{number:.4g}" for number in figures),
            each.unit,
        )
    Console(width=120).print(table)
