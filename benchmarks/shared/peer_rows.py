"""Rows of the comparison with what people run instead: made, kept in a file, shown as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from shared.streaming import share_of_bandwidth
from shared.timing import Report

BITS = {
    "float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int4-head8": 4, "int4-rounded": 4,
    "Q8_0": 8, "Q4_0": 4, "Q4_1": 4,
}  # fmt: skip
"""Bits of a layer's weight, scales not counted, by the name of the weights."""


@dataclass(frozen=True)
class PeerCell:
    """What contenders of one table have in common."""

    shape: str
    origin: str
    dtype: str
    batch: int
    threads: int
    new_tokens: int
    machine: str
    measured: str


@dataclass
class PeerRuns:
    """One engine with one kind of weights, and its runs, one a round.

    Attributes:
        weights: ``float32`` or ``bfloat16`` (native), or the name of what they were quantised to.
        weight_bytes: Bytes of weights that a step reads.
        reports: Rounds in order; every contender of a cell has as many.
    """

    engine: str
    weights: str
    weight_bytes: int
    reports: list[Report]

    @property
    def step_s_R(self) -> np.ndarray:
        """Seconds of a step that gives each row of the batch a token, by round."""
        rows = [len(each.emitted) for each in self.reports]
        return np.array([r.seconds / r.tokens * n for r, n in zip(self.reports, rows, strict=True)])


@dataclass(frozen=True)
class PeerRow:
    """What one engine with one kind of weights reached in one cell.

    Attributes:
        tokens_per_s: Of the whole batch, the median over rounds, with the lowest and highest.
        ratio_hf: Speed over that of ``generate`` in the same round, the median over rounds.
        ratio_llama: The same over llama.cpp with weights of as many bits, the fastest such; None
            where llama.cpp has none.
        share_of_bandwidth: See ``shared.streaming``; the bandwidth is that of the same round.
        bandwidth: Bytes a second that a plain read streams, the median over rounds.
        same_tokens: Leading tokens equal to those of ``generate``, the fewest of all rows.
    """

    shape: str
    origin: str
    dtype: str
    batch: int
    threads: int
    new_tokens: int
    machine: str
    measured: str
    engine: str
    weights: str
    weight_bytes: int
    rounds: int
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    ratio_hf: float
    ratio_hf_low: float
    ratio_hf_high: float
    ratio_llama: float | None
    share_of_bandwidth: float
    bandwidth: float
    same_tokens: int


def rows_of_cell(
    cell: PeerCell, runs: Sequence[PeerRuns], bandwidths: Sequence[float]
) -> list[PeerRow]:
    """Rows of contenders that ran in turns: neighbours in time are compared, as a machine drifts.

    Args:
        cell: What they have in common.
        runs: The contenders; the first is ``generate``.
        bandwidths: Bytes a second of a plain read, one a round.
    """
    base = runs[0]
    expected = base.reports[0].emitted
    rows = []
    for each in runs:
        step_R = each.step_s_R
        rate_R = cell.batch / step_R
        over_hf_R = base.step_s_R / step_R
        shares = [
            share_of_bandwidth(each.weight_bytes, step, speed)
            for step, speed in zip(step_R, bandwidths, strict=True)
        ]
        same = min(map(leading_equal, each.reports[0].emitted, expected))
        rows.append(PeerRow(
            **asdict(cell), engine=each.engine, weights=each.weights,
            weight_bytes=each.weight_bytes, rounds=len(step_R),
            tokens_per_s=float(np.median(rate_R)), tokens_per_s_low=float(rate_R.min()),
            tokens_per_s_high=float(rate_R.max()), ratio_hf=float(np.median(over_hf_R)),
            ratio_hf_low=float(over_hf_R.min()), ratio_hf_high=float(over_hf_R.max()),
            ratio_llama=_over_llama(each, runs), share_of_bandwidth=float(np.median(shares)),
            bandwidth=float(np.median(bandwidths)), same_tokens=same,
        ))  # fmt: skip
    return rows


def leading_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens that two continuations share from the first on."""
    pairs = zip(ours, theirs, strict=True)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(ours))


def _over_llama(each: PeerRuns, runs: Sequence[PeerRuns]) -> float | None:
    bits = BITS[each.weights]
    same = [one for one in runs if one.engine == "llama.cpp" and BITS[one.weights] == bits]
    if not same:
        return None
    fastest = min(same, key=lambda one: float(np.median(one.step_s_R)))
    return float(np.median(fastest.step_s_R / each.step_s_R))


def place(row: PeerRow) -> tuple[object, ...]:
    """What tells a row's table from others: rows with the same are of one run."""
    return (row.shape, row.origin, row.dtype, row.batch, row.threads)


def read_peer_rows(path: Path) -> list[PeerRow]:
    """Rows of a file; none if there is no file."""
    if not path.exists():
        return []
    return [PeerRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def keep(path: Path, new: Sequence[PeerRow]) -> None:
    """Put the rows of a run into a file, in place of older ones of the same tables."""
    replaced = {place(row) for row in new}
    rows = [row for row in read_peer_rows(path) if place(row) not in replaced] + list(new)
    path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def show_peers(rows: Sequence[PeerRow]) -> None:
    """Print one table, titled by what its first row says."""
    first = rows[0]
    title = f"{first.shape} ({first.origin} weights), {first.dtype}, batch {first.batch}"
    title += f", threads {first.threads}; plain read {first.bandwidth / 1e9:.1f} GB/s"
    table = Table("engine", "weights", "MB a step", "tokens/s", "spread", "÷ HF", "spread",
                  "÷ llama.cpp", "of bandwidth", "= HF", title=title)  # fmt: skip
    for row in rows:
        table.add_row(
            row.engine,
            row.weights,
            f"{row.weight_bytes / 1e6:.0f}",
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens_per_s_low:.1f}-{row.tokens_per_s_high:.1f}",
            f"{row.ratio_hf:.2f}",
            f"{row.ratio_hf_low:.2f}-{row.ratio_hf_high:.2f}",
            "" if row.ratio_llama is None else f"{row.ratio_llama:.2f}",
            f"{row.share_of_bandwidth:.0%}",
            f"{row.same_tokens} of {row.new_tokens}",
        )
    Console(width=130).print(table)


def peers_summary(rows: Sequence[PeerRow]) -> str:
    """A Markdown table: a line for each engine and weights, by shape, threads and batch."""
    head = ["model, type", "threads", "batch", "engine", "weights", "tokens/s", "÷ generate",
            "÷ llama.cpp", "of bandwidth"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: (row.shape, row.dtype, row.threads, row.batch)):
        llama = "" if row.ratio_llama is None else f"{row.ratio_llama:.2f}"
        cells = [
            f"{row.shape}, {row.dtype}", str(row.threads), str(row.batch), row.engine, row.weights,
            f"{row.tokens_per_s:.1f} [{row.tokens_per_s_low:.1f}, {row.tokens_per_s_high:.1f}]",
            f"{row.ratio_hf:.2f} [{row.ratio_hf_low:.2f}, {row.ratio_hf_high:.2f}]",
            llama, f"{row.share_of_bandwidth:.0%}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
