"""A coverage-guided fuzzer on all that reads signed bytes and weights: ``make fuzz``.

``make test`` does not collect this file; it takes a minute whatever it finds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="it has wheels for Linux on x86-64 alone")

TARGET = Path(__file__).with_name("fuzz_target.py")
ROOT = Path(__file__).parents[2]
MOST_S = 60
FEWEST_RUNS = 2000


def fuzz(folder: Path, most_s: int, **said: str) -> subprocess.CompletedProcess[str]:
    """Run the target; what made it fail is kept in the folder."""
    (folder / "inputs").mkdir()
    limits = ["-timeout=20", "-rss_limit_mb=1024", "-max_len=20000", "-seed=1"]
    options = [f"-max_total_time={most_s}", f"-artifact_prefix={folder}/", *limits]
    paths = os.pathsep.join(str(ROOT / name) for name in ("src", "tests", "benchmarks"))
    return subprocess.run(
        [sys.executable, str(TARGET), str(folder / "inputs"), *options],
        env=os.environ | {"PYTHONPATH": paths} | said,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


@pytest.mark.timeout(300)
def test_every_reader_refuses_by_its_own_error_and_in_bounds(tmp_path: Path) -> None:
    done = fuzz(tmp_path, MOST_S)
    assert done.returncode == 0, done.stdout[-4000:]
    runs = re.search(r"Done (\d+) runs", done.stdout)
    assert runs is not None
    assert int(runs[1]) > FEWEST_RUNS, done.stdout[-4000:]


@pytest.mark.timeout(300)
def test_a_fault_behind_four_branches_is_found(tmp_path: Path) -> None:
    done = fuzz(tmp_path, 2 * MOST_S, FUZZ_PLANTED="yes")
    assert done.returncode != 0
    assert "the planted fault" in done.stdout
    assert list(tmp_path.glob("crash-*"))
