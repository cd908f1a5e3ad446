"""Tables that commands print: evaluations, tuning runs and measured costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from offramp.agents.evaluation.evaluation_rows import EvaluationRow
from offramp.agents.tuning.kv_quality import LEAVING, FillQuality
from offramp.agents.tuning.quality import Comparison, TuneReport
from offramp.controller.costs.prices import (
    COPY_PARTS,
    LEAST_REPEATS,
    PARTS,
    PROBE_PARTS,
    SPAN_PARTS,
    Batch,
)
from offramp.controller.costs.table import CostTable


def evaluation_table(rows: Sequence[EvaluationRow], chosen: str) -> Table:
    """The table of an evaluation, with 95 % intervals; the arrow marks the published policy.

    Columns: token agreement with full depth, the agreement that replaying traces had promised,
    next-token accuracy, mean layers executed, wall time and energy per token over KV-cached full
    depth.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    table.add_column("agreement", justify="right")
    table.add_column("promised", justify="right")
    table.add_column("accuracy", justify="right")
    table.add_column("layers", justify="right")
    table.add_column("wall ratio", justify="right")
    table.add_column("energy", justify="right")
    for row in rows:
        name = f"{row.policy} ←" if row.policy == chosen else row.policy
        promised = "" if row.offline_agreement is None else f"{row.offline_agreement:.3f}"
        table.add_row(
            name,
            _interval(row.agreement, row.agreement_low, row.agreement_high),
            promised,
            f"{row.accuracy:.3f}",
            f"{row.mean_layers:.2f}",
            _interval(row.wall_ratio, row.wall_ratio_low, row.wall_ratio_high),
            "–" if row.energy_ratio is None else f"{row.energy_ratio:.3f}",
            style="bold" if row.policy == chosen else None,
        )
    return table


def tuning_table(report: TuneReport) -> Table:
    """How often each exit agrees with full depth, before → after a tuning run.

    On the model's own text and on the documents as they are, each with its gain and a 95 %
    interval.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("agreement at exit", "on own text", "gain", "on documents", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, gain in enumerate(report.gains):
        table.add_row(
            str(report.after[index].layer),
            _change(report.own, index, "agreement"),
            _interval(*report.own.gains[index]),
            _change(report, index, "agreement"),
            _interval(*gain),
        )
    return table


def tuning_losses_table(report: TuneReport) -> Table:
    """Each exit's quality on the documents as they are, before → after, and full depth's.

    Columns: KL to full depth and NLL of the document's tokens (nats per token), next-token
    accuracy.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("exit", "KL", "accuracy", "NLL"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(report.after):
        is_exit = index < len(report.gains)
        changes = (_change(report, index, name) for name in ("kl", "accuracy", "nll"))
        table.add_row(str(row.layer) if is_exit else "full", *changes)
    return table


def fill_table(rows: Sequence[FillQuality]) -> Table:
    """What the fill destroys, by exit: plain, and through the map that was fitted."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.title = f"{LEAVING:.0%} of tokens leave; of the others, say something else"
    for name in ("exit", "filled plainly", "through the map"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row.layer), f"{row.plain:.3f}", f"{row.mapped:.3f}")
    return table


def _change(report: Comparison, index: int, name: str) -> str:
    old, new = (getattr(rows[index], name) for rows in (report.before, report.after))
    return f"{old:.3f} → {new:.3f}"


def costs_table(costs: CostTable) -> Table:
    """A cost table in microseconds per launch, ± half of the 95 % interval in per cent.

    A column per number of rows; the probes of other schemas and a copy in fewer bytes by name.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("µs per launch")
    for batch in costs.batches:
        table.add_column(f"{batch.size} rows" if batch.size > 1 else "1 row", justify="right")
    for part in PARTS:
        table.add_row(part, *_timings(costs.batches, part))
    for name in sorted(set(costs.probes) - {costs.schema}):
        for part in PROBE_PARTS:
            table.add_row(f"{part}, {name}", *_timings(costs.probes[name], part))
    for weights, batches in costs.copies.items():
        for part in COPY_PARTS:
            table.add_row(f"{part}, copy in {weights}", *_timings(batches, part))
    return table


def spans_table(costs: CostTable) -> Table:
    """Show costs by tokens of one row in a launch, as a verifying pass takes them."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("µs per launch")
    for span in costs.spans:
        table.add_column(f"{span.size} tokens" if span.size > 1 else "1 token", justify="right")
    for part in SPAN_PARTS:
        table.add_row(part, *_timings(costs.spans, part))
    return table


def _timings(batches: Sequence[Batch], part: str) -> list[str]:
    timings = [batch.parts[part] for batch in batches]
    return [
        f"{each.median_s * 1e6:.1f} "
        + ("±?" if each.repeats < LEAST_REPEATS else f"±{each.half_width:.0%}")
        for each in timings
    ]


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"
