"""Put together what gpu.sh found: how its steps ended, tests, rows, the device's name.

python benchmarks/gpu/gpu_report.py FOLDER DEVICE gpu.json
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch
import transformers

COUNTS = ("tests", "failures", "errors", "skipped")
LOG_LINES = 15
"""Last lines kept of a step that failed."""


def steps_of(folder: Path) -> list[dict[str, Any]]:
    steps = []
    for line in (folder / "steps.tsv").read_text(encoding="utf-8").splitlines():
        name, code, seconds = line.split("\t")
        step: dict[str, Any] = {"name": name, "code": int(code), "seconds": int(seconds)}
        log = folder / f"{name}.log"
        if step["code"] and log.exists():
            step["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[
                -LOG_LINES:
            ]
        steps.append(step)
    return steps


def tests_of(file: Path) -> dict[str, Any]:
    """Counts of a run of pytest, and the names of tests that failed."""
    suite = ET.parse(file).getroot().find("testsuite")
    assert suite is not None
    counts: dict[str, Any] = {name: int(suite.get(name, "0")) for name in COUNTS}
    cases = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    return counts | {"failed": [str(case.get("name")) for case in cases]}


def main(folder: Path, device: str, out: Path) -> None:
    measured = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*.json"))
    }
    is_gpu = device.startswith("cuda") and torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name(device) if is_gpu else device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": steps_of(folder),
        "tests": {file.stem: tests_of(file) for file in sorted(folder.glob("*.xml"))},
        "rows": [row | {"step": name} for name, found in measured.items() for row in found["rows"]],
    }
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, counts in report["tests"].items():
        print(name, counts)
    for step in report["steps"]:
        print(f"{step['name']:32} {step['seconds']:4} s   ended with {step['code']}")
    print(f"{len(report['rows'])} rows in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
