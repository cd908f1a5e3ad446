"""What ``--help`` prints of every command is what was written for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from offramp.deploy.cli.main import TOPICS, build_app

ROOT = Path(__file__).parents[3]
SOURCES = [
    path for folder in ("deploy", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]


def help_texts(source: Path) -> list[str]:
    """Every constant that is passed as ``help=``."""
    calls = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    values = (word.value for call in calls for word in call.keywords if word.arg == "help")
    return [str(value.value) for value in values if isinstance(value, ast.Constant)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_markup_swallows_no_word_of_a_help_text(source: Path) -> None:
    for text in help_texts(source):
        assert Text.from_markup(text).plain == text, (
            "rich reads [words] as markup: use show_default"
        )


def test_there_are_help_texts_to_check() -> None:
    assert sum(len(help_texts(source)) for source in SOURCES) > 100


@pytest.mark.parametrize("command", TOPICS)
def test_every_option_is_explained(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by TERMINAL_WIDTH: who imported rich_utils before has fixed what that says.
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    app = build_app([command])
    shown = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help in shown
        if isinstance(parameter.show_default, str):
            assert f"[default: ({parameter.show_default})]" in shown
