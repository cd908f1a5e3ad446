"""``offramp publish``, ``promote``, ``rollback`` and ``status``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from offramp.controller.bundle import PolicyBundle
from offramp.controller.publisher import Publisher, Release
from offramp.controller.redis_registry import RedisRegistry
from offramp.deploy.console import console
from offramp.deploy.publishing import KEY, open_publisher, open_registry
from offramp.deploy.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(publish)
    app.command()(promote)
    app.command()(rollback)
    app.command()(status)


def publish(
    policy: Annotated[Path, typer.Argument(help="Bundle folder, such as runs/x/policies/chosen.")],
    serve: Annotated[
        bool, typer.Option("--promote/--no-promote", help="Serve it at once.")
    ] = False,
) -> None:
    """Sign a trained policy as the next generation and upload it."""
    bundle = PolicyBundle.load(policy)
    with _publisher() as (publisher, _):
        release = release_bundle(publisher, bundle)
        console.print(f"generation {release.generation} published ({release.digest[:12]})")
        if serve:
            publisher.promote(release.generation)
            console.print(f"generation {release.generation} promoted")


def promote(
    generation: Annotated[int, typer.Argument(min=1, help="A published generation.")],
) -> None:
    """Make a published generation the one that workers run."""
    with _publisher() as (publisher, _):
        publisher.promote(generation)
    console.print(f"generation {generation} promoted")


def rollback(
    to: Annotated[
        int | None, typer.Option(min=1, help="Generation to return to [default: the last good].")
    ] = None,
) -> None:
    """Serve an older policy again, as a new generation."""
    with _publisher() as (publisher, _):
        release = publisher.rollback(to)
    console.print(f"generation {release.generation} serves policy {release.digest[:12]} again")


def status() -> None:
    """Show the head and what each worker says it runs."""
    registry = open_registry(Settings.from_environment())
    try:
        head = registry.head()
        acks = registry.acks()
    finally:
        registry.close()
    console.print("head: none" if head is None else f"head: generation {head.generation}")
    table = Table("worker", "state", "generation", "digest", "seconds ago", "reason")
    for ack in sorted(acks, key=lambda each: each.worker):
        age_s = f"{time.time() - ack.at:.1f}"
        table.add_row(
            ack.worker, ack.state.value, str(ack.generation), ack.digest[:12], age_s, ack.reason
        )
    console.print(table)


def release_bundle(publisher: Publisher, bundle: PolicyBundle) -> Release:
    """Sign a draft as it is."""
    manifest = bundle.manifest
    return publisher.release(
        bundle.packed,
        model=manifest.model,
        tokenizer=manifest.tokenizer,
        training=manifest.training,
        metrics=manifest.metrics,
        certificate=manifest.certificate,
    )


@contextmanager
def _publisher() -> Iterator[tuple[Publisher, RedisRegistry]]:
    settings = Settings.from_environment()
    registry = open_registry(settings)
    if not (settings.home / KEY).exists():
        console.print(f"new signing key in {settings.home}; workers must trust it (serve --trust)")
    try:
        yield open_publisher(settings, registry), registry
    finally:
        registry.close()
