"""Reads which models a pool serves, and how, from a file."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import typer

from offramp.controller.errors import ConfigError

OF_THE_POOL = (
    *("models", "served_model_name", "host", "port", "redis_port", "max_body_bytes", "max_choices"),
    *("deadline", "drain", "trust", "log_format"),
)
"""Options of the command that no single model can have."""


def models_of(context: typer.Context, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each model, by the name that clients ask for.

    Args:
        context: The command.
        given: Its options; what no table says holds for all models. ``models`` is a TOML file with
            a table per model, whose keys are options of the command; None: there is one model.

    Raises:
        ConfigError: the file cannot be read, is no TOML, or says what is no option of a model or no
            value of one.
    """
    file = given["models"]
    if file is None:
        return {given["served_model_name"] or Path(given["model"]).resolve().name: given}
    if given["served_model_name"] is not None:
        problem = "names one model, and the names of --models are in its file"
        raise ConfigError("served_model_name", problem, "Leave it out")
    tables = _tables(file)
    return {name: given | _read(context, name, table) for name, table in tables.items()}


def _tables(file: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("models", f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError("models", f"{file} is no TOML: {error}", "Correct it") from error
    loose = [name for name, table in tables.items() if not isinstance(table, dict)]
    if loose or not tables:
        problem = f"{file} says {loose[0]!r} outside of a table" if loose else f"{file} is empty"
        raise ConfigError("models", problem, 'Write a table per model, like ["NAME"]')
    return tables


def _read(context: typer.Context, name: str, table: dict[str, Any]) -> dict[str, Any]:
    """The options of one model."""
    said = read_options(context, table, f"models: {name}.", "a model", OF_THE_POOL).params
    return {key: said[key] for key in table}


def read_options(
    context: typer.Context,
    table: dict[str, Any],
    place: str,
    whose: str,
    others: Collection[str] = (),
) -> typer.Context:
    """What a file says of a command's options, read as the command reads them.

    Args:
        context: The command's, or one of its like.
        table: Values by the options' names.
        place: Where in which file they stand, for errors.
        whose: What they are options of, for errors.
        others: Options that may not stand there.

    Raises:
        ConfigError: one is no option, or its value none of it.
    """
    command = context.command
    known = {each.name: each for each in command.params if each.name not in others}
    words = []
    for key, value in table.items():
        if key not in known:
            names = ", ".join(sorted(filter(None, known)))
            raise ConfigError(f"{place}{key}", f"is no option of {whose}", f"Use {names}")
        if isinstance(value, bool):
            words += [f"--{_dashed(key)}"] * value
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{_dashed(key)}={each}" for each in values]
    try:
        return cast("typer.Context", command.make_context(context.info_name, words))
    except typer.BadParameter as error:
        field = error.param.name if error.param is not None else "?"
        raise ConfigError(f"{place}{field}", error.message.rstrip("."), "") from error


def _dashed(key: str) -> str:
    return key.replace("_", "-")
