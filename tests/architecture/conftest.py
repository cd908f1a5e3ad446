from __future__ import annotations

from pathlib import Path

import pytest

FOLDERS = ("controller", "worker", "envs", "agents", "deploy", "research")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sources(root: Path) -> list[Path]:
    """Every Python file that the wheel installs."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
