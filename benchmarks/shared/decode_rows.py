"""Rows of the decoding benchmark: shown as tables, read back from a file, and summed up."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

SUMMED_UP = "exits 25%"
"""The scripted depth that the summary is of."""

BATCHES = (1, 8)
"""The batches that it is of."""

FIRST_COLUMNS = "| model, type | batch | full depth ÷ generate | mean layers | bound |"
COLUMNS = f"{FIRST_COLUMNS} `project` | cohorts | `defer` | `verify` |"


@dataclass
class DecodeRow:
    """One engine setting on one shape, dtype and batch.

    ``threads`` and ``run`` say under which conditions; rows of a run share their baselines.
    """

    shape: str
    dtype: str
    batch: int
    engine: str
    kv_mode: str | None
    schedule: str | None
    exit_share: float | None
    mean_layers: float | None
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    ratio_hf: float
    ratio_full: float
    bound: float | None
    bound_packed: float | None
    share_of_bound: float | None
    decision_share: float | None
    fill_share: float | None
    accepted: float | None
    peak_mb: float | None
    threads: int | None = None
    run: int | None = None
    ratio_full_low: float | None = None
    ratio_full_high: float | None = None
    graphs: int | None = None


def read_rows(
    path: Path, shapes: Collection[str], dtypes: Collection[str], batches: Collection[int]
) -> list[DecodeRow]:
    """The rows of a JSON file of the benchmark that are of these shapes, dtypes and batches."""
    names = {field.name for field in fields(DecodeRow)}
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = [DecodeRow(**{name: row[name] for name in names & row.keys()}) for row in found]
    return [
        row for row in rows if row.shape in shapes and row.dtype in dtypes and row.batch in batches
    ]


def tables_of(rows: list[DecodeRow]) -> list[list[DecodeRow]]:
    """The rows by what was measured together: shape, dtype, batch, threads and run."""
    tables: dict[tuple[object, ...], list[DecodeRow]] = {}
    for row in rows:
        key = (row.shape, row.dtype, row.batch, row.threads, row.run)
        tables.setdefault(key, []).append(row)
    return list(tables.values())


def show(rows: list[DecodeRow]) -> None:
    """Print one table, titled by what its first row says."""
    first = rows[0]
    title = f"{first.shape}, {first.dtype}, batch {first.batch}"
    title += "" if first.threads is None else f", threads {first.threads}"
    title += "" if first.run is None else f", run {first.run}"
    table = Table(
        "engine", "mode", "schedule", "layers", "tokens/s", "spread", "÷ HF", "÷ full", "bound",
        "share", "packed", "decide", "fill", "accepted", "MiB", title=title,
    )  # fmt: skip
    for row in rows:
        table.add_row(
            row.engine,
            row.kv_mode or "",
            row.schedule or "",
            _number(row.mean_layers, ".1f"),
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s_low:.1f}-{row.tokens_per_s_high:.1f}",
            f"{row.ratio_hf:.2f}",
            f"{row.ratio_full:.2f}{_range(row)}",
            _number(row.bound, ".2f"),
            _number(row.share_of_bound, ".0%"),
            _number(row.bound_packed, ".2f"),
            _number(row.decision_share, ".1%"),
            _number(row.fill_share, ".1%"),
            _number(row.accepted, ".0%"),
            _number(row.peak_mb, ".0f"),
        )
    Console(width=150).print(table)


def summary(rows: list[DecodeRow]) -> str:
    """A Markdown table of one thread's rows: exits at one depth in every mode, ÷ full depth."""
    lines = [COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
    for table in tables_of(rows):
        first = table[0]
        if first.threads == 1 and first.batch in BATCHES:
            lines += _summed_up(table, SUMMED_UP, f"{first.shape}, {first.dtype}")
            lines += _summed_up(table, "learned", f"{first.shape}, learned policy")
    return "\n".join(lines) + "\n"


def _summed_up(table: list[DecodeRow], engine: str, name: str) -> list[str]:
    cells = {(row.kv_mode, row.schedule): row for row in table if row.engine == engine}
    if not cells:
        return []
    [full] = [row for row in table if row.engine == "full depth"]
    plain = cells["project", "lock-step"]
    ratios = [
        cells.get((mode, schedule))
        for mode, schedule in (
            ("project", "lock-step"), ("project", "cohorts"),
            ("defer", "lock-step"), ("verify", "lock-step"),
        )
    ]  # fmt: skip
    texts = [
        name,
        str(plain.batch),
        f"{full.ratio_hf:.2f}",
        _number(plain.mean_layers, ".1f"),
        _number(plain.bound, ".2f"),
        *("" if row is None else f"{row.ratio_full:.2f}" for row in ratios),
    ]
    return [f"| {' | '.join(texts)} |"]


def _range(row: DecodeRow) -> str:
    if row.ratio_full_low is None or row.ratio_full_high is None:
        return ""
    return f" ({row.ratio_full_low:.2f}-{row.ratio_full_high:.2f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
