"""docs/decoding.md sums up docs/decoding.json, whose rows a command of the benchmark prints."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "reference")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def shared(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / "benchmarks/shared/decode_rows.py"))


def test_the_page_holds_the_summary_of_the_rows(root: Path, shared: dict[str, Any]) -> None:
    rows = shared["read_rows"](root / "docs/decoding.json", SHAPES, DTYPES, (1, 4, 8, 16))
    assert shared["summary"](rows) in (root / "docs/decoding.md").read_text(encoding="utf-8")


def test_rows_are_picked_by_shape_dtype_and_batch(root: Path, shared: dict[str, Any]) -> None:
    path = root / "docs/decoding.json"
    everything = shared["read_rows"](path, SHAPES, DTYPES, (1, 4, 8, 16))
    picked = shared["read_rows"](path, ["reference"], ["float32"], [8])
    assert 0 < len(picked) < len(everything)
    assert {(row.shape, row.dtype, row.batch) for row in picked} == {("reference", "float32", 8)}
    tables = shared["tables_of"](picked)
    assert sum(map(len, tables)) == len(picked)
    assert [{row.threads for row in table} for table in tables] == [{1}, {2}]


def test_a_table_is_printed(
    root: Path, shared: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    picked = shared["read_rows"](root / "docs/decoding.json", ["reference"], ["float32"], [1])
    shared["show"](shared["tables_of"](picked)[0])
    printed = capsys.readouterr().out
    assert "reference, float32, batch 1, threads 1" in printed
    assert "full depth" in printed
