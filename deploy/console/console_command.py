"""Run ``offramp console``: the operator's page of a channel, on a port and a key of its own."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer
import uvicorn

from offramp.deploy.cli.console import say
from offramp.deploy.cli.releases.channel_option import Channel
from offramp.deploy.console.console_app import create_console
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.settings import Settings

MAX_CONNECTIONS = 64
"""Connections at once; more get 503."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(console)


def console(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8010,
    channel: Channel = None,
) -> None:
    """Show the channel on a web page, to promote and roll back where the signing key lies."""
    settings = Settings.from_environment(channel=channel)
    registry = open_registry(settings)
    key = settings.console_key or secrets.token_urlsafe(24)
    say(f"console of channel {settings.channel}: http://{host}:{port}/")
    if settings.console_key is None:
        say(f"its key, until it ends (OFFRAMP_CONSOLE_KEY sets one): {key}")
    try:
        uvicorn.run(
            create_console(registry, settings, key),
            host=host, port=port, log_level="warning", access_log=False,
            limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2,
        )  # fmt: skip
    finally:
        registry.close()
