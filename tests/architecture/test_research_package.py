"""`research/` is a distribution of its own, and nothing in the product needs it."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

import pytest

PRODUCT = ("controller", "worker", "envs", "agents", "deploy")


@pytest.fixture
def product(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def research(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "research" / "pyproject.toml").read_text(encoding="utf-8"))


def test_each_distribution_asks_for_the_others_own_version(
    product: dict[str, Any], research: dict[str, Any]
) -> None:
    version = product["project"]["version"]
    assert research["project"]["version"] == version
    assert research["project"]["dependencies"] == [f"offramp=={version}"]
    extra = product["project"]["optional-dependencies"]["research"]
    assert extra == [f"{research['project']['name']}=={version}"]


def test_every_folder_of_research_is_installed_and_only_there(
    root: Path, product: dict[str, Any], research: dict[str, Any]
) -> None:
    folders = (path.parent.relative_to(root) for path in (root / "research").rglob("__init__.py"))
    found = sorted(".".join(("offramp", *folder.parts)) for folder in folders)
    assert sorted(research["tool"]["setuptools"]["packages"]) == found
    assert product["tool"]["setuptools"]["packages"]["find"]["exclude"] == ["offramp.research*"]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_the_product_imports_nothing_of_research(root: Path, sources: list[Path]) -> None:
    product = [path for path in sources if path.relative_to(root).parts[0] in PRODUCT]
    assert len(product) > 100
    users = {
        path.relative_to(root).as_posix()
        for path in product
        if any(name.startswith("offramp.research") for name in imported(path))
    }
    assert not users
