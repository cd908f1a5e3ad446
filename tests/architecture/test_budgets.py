from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

FILE_LINES = 300
FUNCTION_LINES = 60
MEDIAN_BODY_LINES = 10


@dataclass(frozen=True)
class Function:
    """A function's name with its place, and its sizes in lines."""

    name: str
    lines: int
    body_lines: int


def measure(node: ast.FunctionDef | ast.AsyncFunctionDef, place: str) -> Function:
    last = node.end_lineno or node.lineno
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    body_lines = last - body[0].lineno + 1 if body else 0
    return Function(f"{place}:{node.lineno} {node.name}", last - node.lineno + 1, body_lines)


@pytest.fixture(scope="module")
def functions(root: Path, sources: list[Path]) -> list[Function]:
    found = []
    for path in sources:
        place = path.relative_to(root).as_posix()
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        found += [measure(node, place) for node in nodes if isinstance(node, kinds)]
    return found


def test_files_are_short(root: Path, sources: list[Path]) -> None:
    sizes = {
        path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources
    }
    long = [f"{place}: {lines} lines" for place, lines in sizes.items() if lines > FILE_LINES]
    assert not long, f"files over {FILE_LINES} lines: " + ", ".join(long)


def test_functions_are_short(functions: list[Function]) -> None:
    long = [f"{each.name}: {each.lines} lines" for each in functions if each.lines > FUNCTION_LINES]
    assert not long, f"functions over {FUNCTION_LINES} lines: " + ", ".join(long)


def test_the_median_function_is_small(functions: list[Function]) -> None:
    middle = median(each.body_lines for each in functions)
    longest = sorted(functions, key=lambda each: each.body_lines, reverse=True)[:10]
    names = ", ".join(f"{each.name}: {each.body_lines}" for each in longest)
    assert middle <= MEDIAN_BODY_LINES, f"median body is {middle} lines; the longest: {names}"


def test_the_measure_leaves_the_docstring_out() -> None:
    source = 'def spam(\n    egg: int,\n) -> int:\n    """Doc.\n\n    More."""\n    return egg\n'
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    assert measure(node, "here.py") == Function("here.py:1 spam", lines=7, body_lines=1)
