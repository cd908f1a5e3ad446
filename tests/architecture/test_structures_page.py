"""docs/structures.md names every module, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDERS = ("controller", "worker", "envs", "agents", "deploy", "research")
ROW = re.compile(r"^\| `([\w/]+\.py)` \| (.+) \|$", re.MULTILINE)
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w/]+\.py)`")


def first_sentence(module: Path) -> str:
    """The first paragraph of a module's docstring, as a table cell."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".").replace("``", "`")


def modules(root: Path) -> dict[str, str]:
    """First sentences of all modules, by path."""
    found = (path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    kept = (path for path in found if path.name != "__init__.py")
    return {str(path.relative_to(root)): first_sentence(path) for path in kept}


def rows(page: str) -> dict[str, str]:
    """The page's tables: one per folder, under its heading."""
    parts = re.split(r"^### `(\w+)/`$", page, flags=re.MULTILINE)[1:]
    named = zip(parts[::2], parts[1::2], strict=True)
    return {f"{folder}/{name}": text for folder, part in named for name, text in ROW.findall(part)}


def test_every_module_is_in_the_table_with_its_first_sentence(root: Path) -> None:
    page = (root / "docs/structures.md").read_text(encoding="utf-8")
    assert rows(page) == modules(root)


def test_every_path_in_the_text_exists(root: Path) -> None:
    page = (root / "docs/structures.md").read_text(encoding="utf-8")
    named = PATH.findall(page)
    assert len(named) > 30
    assert [path for path in named if not (root / path).exists()] == []
