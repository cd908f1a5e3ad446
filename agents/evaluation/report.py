"""An evaluation as a page to read: HTML that stands alone, and Markdown beside its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.plots import (
    FrontierPoint,
    Gap,
    draw_exit_depths,
    draw_frontier,
    draw_gap,
    draw_savings,
)
from offramp.agents.evaluation.scores import AGREEMENT, METRICS
from offramp.agents.evaluation.statistics import Estimate
from offramp.controller.durable import write_durably

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:46rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin-top:2rem}
img{width:100%;height:auto}.lead{font-size:1.1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;white-space:nowrap}
td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e3e3e3}
td:first-child,th:first-child{text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:#666}dd{margin:0}
"""


@dataclass(frozen=True, slots=True)
class Table:
    """A heading per column, and the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: prose, perhaps a picture (a PNG in the report's folder) or a table."""

    title: str
    text: str
    picture: str = ""
    table: Table | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What a report is made of.

    Attributes:
        title: What was evaluated.
        headlines: The findings, one sentence each.
        conditions: Model, dtype, batch, threads, seeds, machine, documents and the like, by name.
        matched: Rows at matched quality.
        points: Points of the frontier, by metric.
        gaps: Offline promises and what became of them.
        depths: Tokens by layer they left after, by policy.
        layers: Layers of the model.
        extra: Further sections, which come last.
    """

    title: str
    headlines: Sequence[str]
    conditions: Mapping[str, str]
    matched: Sequence[MatchedRow]
    points: Mapping[str, Sequence[FrontierPoint]]
    gaps: Sequence[Gap]
    depths: Mapping[str, Mapping[int, int]]
    layers: int
    extra: Sequence[Section] = field(default_factory=tuple)


def write_report(report: EvaluationReport, folder: Path) -> None:
    """Write ``report.html`` (self-contained), ``report.md`` and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [*_pictures(report, folder), *report.extra]
    write_durably(folder / "report.md", _markdown(report, sections).encode())
    write_durably(folder / "report.html", _html(report, sections, folder).encode())


def matched_table(rows: Sequence[MatchedRow]) -> Table:
    """Rows of one metric, as text; with energy, under its method, where some row has it."""
    head = ["policy", "target", "quality", "loss on test", "layers", "wall ÷ full"]
    methods = [row.energy_method for row in rows if row.energy_ratio is not None]
    if methods:
        head.append(f"energy ÷ full, {methods[0]}".replace("_", " "))
    cells = [_matched_cells(row, with_energy=bool(methods)) for row in rows]
    return Table([*head, "promised", "kept"], cells)


def _matched_cells(row: MatchedRow, *, with_energy: bool) -> list[str]:
    return [
        row.policy,
        f"{100 * row.target_loss:g} %",
        f"{row.quality:.3f}",
        lost(row),
        f"{row.mean_layers:.2f}",
        interval(row.wall),
        *([interval(row.energy)] if with_energy else []),
        "–" if row.agreement_offline is None else f"{row.agreement_offline:.3f}",
        f"{row.agreement_online:.3f}",
    ]


def interval(estimate: Estimate | None) -> str:
    """A value with its interval, as text; a dash where there is none."""
    if estimate is None:
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def lost(row: MatchedRow) -> str:
    """The relative loss on test documents with its interval, as text."""
    return f"{100 * row.loss:+.1f} % [{100 * row.loss_low:+.1f}, {100 * row.loss_high:+.1f}]"


def _pictures(report: EvaluationReport, folder: Path) -> list[Section]:
    sections = []
    for name, metric in METRICS.items():
        rows = [row for row in report.matched if row.metric == name]
        if rows:
            draw_savings(rows, metric.label, folder / f"savings_{name}.png")
            text = (
                "Each family at its fastest operating point that kept the loss on validation; "
                "full depth where none did. Measured once, on test documents."
            )
            if metric is not AGREEMENT:
                text += f" Full depth's {metric.label} is {rows[0].quality_full:.3f}."
            title = f"Time left at a bounded loss of {metric.label}"
            ordered = sorted(rows, key=lambda row: (row.target_loss, row.wall_ratio or 1.0))
            sections.append(Section(title, text, f"savings_{name}.png", matched_table(ordered)))
        if report.points.get(name):
            picture = "frontier.png" if metric is AGREEMENT else f"frontier_{name}.png"
            draw_frontier(report.points[name], metric.label, folder / picture)
            text = "Up and left is better. Bars are 95 % intervals over documents and seeds."
            sections.append(Section(f"Frontier: {metric.label}", text, picture))
    if report.gaps:
        draw_gap(report.gaps, folder / "gap.png")
        text = (
            "Traces are recorded with an exact cache; decoding attends to what early exits left "
            "behind. The difference is the price of trusting a replay."
        )
        sections.append(Section("Offline promise, on-policy fact", text, "gap.png"))
    if report.depths:
        draw_exit_depths(report.depths, report.layers, folder / "exit_depths.png")
        sections.append(Section("Exit depths", "Teacher-forced test tokens.", "exit_depths.png"))
    return sections


def _markdown(report: EvaluationReport, sections: Sequence[Section]) -> str:
    lines = [f"# {report.title}", ""]
    lines += [f"- {sentence}" for sentence in report.headlines]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.text]
        if section.picture:
            lines += ["", f"![{section.title}]({section.picture})"]
        if section.table is not None:
            lines += ["", _markdown_row(section.table.head)]
            lines += [_markdown_row(["---"] * len(section.table.head))]
            lines += [_markdown_row(row) for row in section.table.rows]
    lines += ["", "## Conditions", ""]
    lines += [f"- **{name}**: {value}" for name, value in report.conditions.items()]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(report: EvaluationReport, sections: Sequence[Section], folder: Path) -> str:
    findings = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in report.headlines)
    body = "".join(_html_section(section, folder) for section in sections)
    conditions = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in report.conditions.items()
    )
    title = html.escape(report.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<ul class="lead">{findings}</ul>{body}<h2>Conditions</h2><dl>{conditions}</dl>'
        "</body></html>\n"
    )


def _html_section(section: Section, folder: Path) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
    if section.picture:
        data = base64.b64encode((folder / section.picture).read_bytes()).decode()
        alt = html.escape(section.title, quote=True)
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
    if section.table is not None:
        parts.append(f'<div class="scroll">{_html_table(section.table)}</div>')
    return "".join(parts)


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return (
        "<table>" + row(table.head, "th") + "".join(row(r, "td") for r in table.rows) + "</table>"
    )
