"""Run ``offramp clients``: who may ask the pool over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.controller.errors import ConfigError
from offramp.deploy.cli.console import say
from offramp.deploy.clients.allowances import LOSSLESS, Allowance
from offramp.deploy.clients.client_keys import (
    CLIENTS,
    add_client,
    bound_client,
    read_clients,
    remove_client,
)
from offramp.deploy.serve.settings import Settings

_clients = typer.Typer(help="Give keys to clients, and take them away.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the client.")]
Requests = Annotated[
    int | None, typer.Option(min=1, help="Most requests that make tokens.", show_default="no bound")
]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens that they hold and may make.", show_default="no bound"),
]
Quality = Annotated[
    str | None,
    typer.Option(help="Least quality, such as 0.99, or lossless.", show_default="no bound"),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(_clients, name="clients")


@_clients.command()
def add(
    name: Name,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    quality: Quality = None,
) -> None:
    """Give a client a key and print it, once. Only its hash is kept."""
    say(add_client(_path(), name, _allowance(requests_per_minute, tokens_per_minute, quality)))


@_clients.command()
def bound(
    name: Name,
    requests_per_minute: Requests = None,
    tokens_per_minute: Tokens = None,
    quality: Quality = None,
) -> None:
    """Say anew what a client may ask: bounds that are not named are lifted. Its key stays."""
    allowance = _allowance(requests_per_minute, tokens_per_minute, quality)
    bound_client(_path(), name, allowance)
    say(f"{name} may ask: {_told(allowance)}")


@_clients.command()
def remove(name: Name) -> None:
    """Take a client's key away. Pools that run refuse it from now on."""
    remove_client(_path(), name)
    say(f"{name} is no client any more")


@_clients.command(name="list")
def list_clients() -> None:
    """List the clients that have a key, and what they may ask."""
    for name, client in read_clients(_path()).items():
        say(f"{name}: {_told(client.allowance)}")


def _allowance(requests: int | None, tokens: int | None, quality: str | None) -> Allowance:
    return Allowance(
        requests_per_minute=requests, tokens_per_minute=tokens, quality=_parse_quality(quality)
    )


def _parse_quality(text: str | None) -> Any:
    if text is None or text == LOSSLESS:
        return text
    try:
        return float(text)
    except ValueError as error:
        problem = f"{text!r:.40} is no share"
        raise ConfigError("quality", problem, f'Write 0 to 1, or "{LOSSLESS}"') from error


def _told(allowance: Allowance) -> str:
    bounds = allowance.to_values().items()
    return ", ".join(f"{name} {value}" for name, value in bounds) or "no bounds"


def _path() -> Path:
    return Settings.from_environment().home / CLIENTS
