"""No file and no class name stands twice in the project, and no folder is crowded."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

FOLDERS = (
    "controller", "worker", "envs", "agents", "deploy", "research", "benchmarks", "examples",
    "tests",
)  # fmt: skip
MOST_FILES = 15
NAMELESS = ("__init__.py", "conftest.py")
"""File names that Python and pytest ask for in every folder."""


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*"))
    kept = (path for path in found if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(root) for path in kept if ".egg-info" not in str(path))


def twice(named: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Names that stand in more than one place, and where."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in named:
        places[name].append(str(path))
    return {name: found for name, found in places.items() if len(found) > 1}


def classes(source: str) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


def crowded(files: Iterable[Path]) -> dict[str, int]:
    counts = Counter(str(path.parent) for path in files if path.name != "py.typed")
    return {folder: count for folder, count in counts.items() if count > MOST_FILES}


def test_no_file_name_stands_twice(files: list[Path]) -> None:
    modules = [path for path in files if path.suffix == ".py" and path.name not in NAMELESS]
    assert len(modules) > 300
    assert twice((path.name, path) for path in modules) == {}


def test_no_class_name_stands_twice(root: Path, files: list[Path]) -> None:
    modules = [path for path in files if path.suffix == ".py"]
    texts = {path: (root / path).read_text(encoding="utf-8") for path in modules}
    assert twice((name, path) for path in modules for name in classes(texts[path])) == {}


def test_no_folder_is_crowded(files: list[Path]) -> None:
    assert crowded(files) == {}


def test_the_checks_can_fail() -> None:
    here, there = Path("a/spam.py"), Path("b/spam.py")
    assert twice([("spam.py", here), ("spam.py", there)]) == {"spam.py": ["a/spam.py", "b/spam.py"]}
    assert classes("class Spam:\n    class Egg: ...\n") == ["Spam", "Egg"]
    assert crowded(Path(f"a/{n}.py") for n in range(16)) == {"a": 16}
