"""gpu.sh keeps to its time and writes down what it has, on whatever machine it runs."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = "benchmarks/gpu/gpu.sh"
JUNIT = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="0">
<testcase name="right"/><testcase name="wrong"><failure/></testcase><testcase name="good"/>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / "benchmarks/gpu/gpu_report.py"))


def test_whatever_had_no_time_is_named(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    settings = {"PYTHON": sys.executable, "DEVICE": "cpu", "LIMIT_S": "0", "OUT": str(out)}
    subprocess.run(["bash", SCRIPT], cwd=root, env=os.environ | settings, check=True, timeout=120)
    found = json.loads(out.read_text())
    assert found["device"] == "cpu"
    assert found["rows"] == []
    names = {step["name"] for step in found["steps"]}
    assert {"tests-bfloat16", "decode-qwen2.5-0.5b-32", "static-llama-3.2-1b-1"} <= names
    assert {step["code"] for step in found["steps"]} == {124}


def test_every_wheel_is_pinned(root: Path) -> None:
    [names] = re.findall(r"^NAMES=\((.*?)\)", (root / SCRIPT).read_text(), re.MULTILINE | re.DOTALL)
    pinned = re.findall(r"^(\S+)==", (root / "constraints.txt").read_text(), re.MULTILINE)
    missing = {plain(name) for name in names.split()} - {plain(name) for name in pinned}
    assert names.split()
    assert not missing


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


def test_parts_are_put_together(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "steps.tsv").write_text("tests\t1\t7\ndecode\t0\t9\nlate\t124\t60\n")
    (tmp_path / "tests.xml").write_text(JUNIT)
    (tmp_path / "tests.log").write_text("\n".join(map(str, range(99))))
    (tmp_path / "decode.json").write_text('{"rows": [{"engine": "full depth"}]}')
    report["main"](tmp_path, "cpu", tmp_path / "out")
    found = json.loads((tmp_path / "out").read_text())
    assert found["tests"]["tests"] == {
        "tests": 3, "failures": 1, "errors": 0, "skipped": 0, "failed": ["wrong"]
    }  # fmt: skip
    assert found["rows"] == [{"engine": "full depth", "step": "decode"}]
    first, second, third = found["steps"]
    assert first["log"][-1] == "98"
    assert "log" not in second
    assert (third["name"], third["code"], third["seconds"]) == ("late", 124, 60)
