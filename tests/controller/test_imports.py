from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import offramp.controller

SCRIPT = """
import importlib, pkgutil, sys
import offramp.controller
for module in pkgutil.walk_packages(offramp.controller.__path__, "offramp.controller."):
    importlib.import_module(module.name)
%s
print(sorted({"torch", "ray", "transformers", "stable_baselines3"} & sys.modules.keys()))
print(sum(name.startswith("offramp.controller.") for name in sys.modules))
"""


def loaded(extra: str) -> list[str]:
    run = [sys.executable, "-c", SCRIPT % extra]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.split("\n")


def test_the_controller_loads_neither_torch_nor_ray() -> None:
    heavy, count = loaded("")[:2]
    assert heavy == "[]"
    files = list(Path(offramp.controller.__path__[0]).rglob("[!_]*.py"))
    assert int(count) >= len(files) > 10


def test_the_measure_would_notice() -> None:
    # Negative control with a stand-in, for importing torch takes seconds.
    assert loaded("sys.modules['torch'] = sys")[0] == "['torch']"
