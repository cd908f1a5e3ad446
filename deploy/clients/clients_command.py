"""Run ``offramp clients``: who may ask the pool over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.deploy.cli.console import say
from offramp.deploy.clients.client_keys import CLIENTS, add_client, read_clients, remove_client
from offramp.deploy.serve.settings import Settings

_clients = typer.Typer(help="Give keys to clients, and take them away.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the client.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(_clients, name="clients")


@_clients.command()
def add(name: Name) -> None:
    """Give a client a key and print it, once. Only its hash is kept."""
    say(add_client(_path(), name))


@_clients.command()
def remove(name: Name) -> None:
    """Take a client's key away. Pools that run refuse it from now on."""
    remove_client(_path(), name)
    say(f"{name} is no client any more")


@_clients.command(name="list")
def list_clients() -> None:
    """List the clients that have a key."""
    for name in read_clients(_path()):
        say(name)


def _path() -> Path:
    return Settings.from_environment().home / CLIENTS
