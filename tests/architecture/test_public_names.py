"""The public names of each package, pinned: `exported_names.json` changes with a decision."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

TABLE: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("exported_names.json").read_text(encoding="utf-8")
)
PACKAGES = [
    f"offramp.{name}"
    for name in ("agents", "controller", "deploy", "envs", "worker", "worker.model.families")
]


def test_the_table_names_every_package() -> None:
    assert sorted(TABLE) == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_are_pinned(package: str) -> None:
    exported = getattr(importlib.import_module(package), "__all__", [])
    assert sorted(exported) == TABLE[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in TABLE[package] if not hasattr(module, name)] == []
