"""Docstrings say what a newcomer needs: no riddles of two words, no sentence without a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

RIDDLE = re.compile(r"^((Of|As of|As for|Whose)\b|(Which|How|Its|Theirs)\b[^.]{0,14}\.?$)")
"""It only points at something, or hangs on a sentence that is not there."""

LEAST_WORDS = 2


def docstrings(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=True)
            if text:
                yield text, getattr(node, "lineno", 1)


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Names and texts of what stands under Args and Attributes."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text, re.MULTILINE):
        for name, said in re.findall(r"^    ([\w*, ]+): (.+(?:\n     .*)*)", section, re.MULTILINE):
            yield name, " ".join(said.split())


def test_entries_are_no_riddles(root: Path, sources: list[Path]) -> None:
    found = [
        f"{path.relative_to(root)}:{line} {name}: {said}"
        for path in sources
        for text, line in docstrings(path)
        for name, said in entries(text)
        if len(said.split()) < LEAST_WORDS or RIDDLE.match(said)
    ]
    assert not found, "\n".join(found)


def test_no_docstring_begins_with_of(root: Path, sources: list[Path]) -> None:
    found = [
        f"{path.relative_to(root)}:{line} {text.splitlines()[0]}"
        for path in sources
        for text, line in docstrings(path)
        if re.match(r"^(Of|As of|As for)\b", text)
    ]
    assert not found, "\n".join(found)
