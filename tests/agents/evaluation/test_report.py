"""The report: one page that needs nothing else, and Markdown whose pictures are there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from offramp.agents.evaluation.matched import TARGETS, MatchedRow
from offramp.agents.evaluation.plots import FrontierPoint, Gap
from offramp.agents.evaluation.report import (
    EvaluationReport,
    Section,
    Table,
    matched_table,
    write_report,
)
from offramp.agents.evaluation.statistics import Estimate


def row(policy: str, target: float, wall: float | None) -> MatchedRow:
    return MatchedRow(
        policy=policy, seeds=1, target_loss=target, metric="agreement", quality=0.97,
        quality_full=1.0, loss=0.03, loss_low=0.02, loss_high=0.04, mean_layers=7.5,
        wall_ratio=wall, wall_ratio_low=wall and wall - 0.1, wall_ratio_high=wall and wall + 0.1,
        agreement_offline=None, agreement_online=0.97, certified=False, picks=("a",),
    )  # fmt: skip


@pytest.fixture
def report() -> EvaluationReport:
    point = FrontierPoint("p̂", Estimate(0.8, 0.7, 0.9), Estimate(0.97, 0.96, 0.98), is_chosen=True)
    return EvaluationReport(
        title="A <report>",
        headlines=["First & foremost"],
        conditions={"model": "<small>"},
        matched=[
            row(name, target, wall)
            for name, wall in (("p̂", 0.8), ("rule", 1.0), ("oracle", None))
            for target in TARGETS
        ],
        points={"agreement": [point, FrontierPoint("rule", point.wall, point.quality)]},
        gaps=[Gap("p̂ τ=0.9", "p̂", 0.97, 0.93)],
        depths={"p̂ τ=0.9": {3: 10, 12: 30}},
        layers=12,
        extra=[Section("More", "text", table=Table(("a", "b"), [("1|2", "3")]))],
    )


def test_the_page_needs_nothing_else(report: EvaluationReport, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in page
    assert "<script" not in page
    assert 'name="viewport"' in page
    assert "A &lt;report&gt;" in page
    assert "&lt;small&gt;" in page


def test_energy_is_a_column_under_its_method_where_it_is_known() -> None:
    plain = [row("p̂", 0.01, 0.8), row("rule", 0.01, 0.9)]
    assert not [name for name in matched_table(plain).head if "energy" in name]
    known = replace(
        plain[0],
        energy_method="measured_shared",
        energy_ratio=0.7,
        energy_ratio_low=0.6,
        energy_ratio_high=0.8,
    )
    table = matched_table([known, plain[1]])
    place = list(table.head).index("energy ÷ full, measured shared")
    assert [cells[place] for cells in table.rows] == ["0.700 [0.600, 0.800]", "–"]
    assert {len(cells) for cells in table.rows} == {len(table.head)}


def test_the_markdown_names_pictures_that_are_there(
    report: EvaluationReport, tmp_path: Path
) -> None:
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert pictures == ["savings_agreement.png", "frontier.png", "gap.png", "exit_depths.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "| 1\\|2 | 3 |" in text
    assert "- **model**: <small>" in text
    assert "| oracle | 0.5 % | 0.970 |" in text
