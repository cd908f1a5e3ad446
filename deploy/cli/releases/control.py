"""Run ``offramp publish``, ``promote``, ``rollback`` and ``status``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from offramp.controller.adapters.adapter_index import MIB, AdapterSource
from offramp.controller.errors import (
    ConfigError,
    PolicyRefusedError,
    PromoteConflictError,
    RegistryUnavailableError,
)
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.heads import open_head
from offramp.controller.release.manifest import Manifest, require_said
from offramp.controller.release.publisher import STAMP_TTL_S, Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Head, PolicyRegistry
from offramp.controller.watching.guardrails import GUARDRAILS, Guardrails
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps
from offramp.deploy.cli.console import console, say
from offramp.deploy.cli.releases.channel_option import Channel
from offramp.deploy.cli.releases.tracks import UNKNOWN, points_of, tracks_table
from offramp.deploy.serve.publishing import (
    KEY,
    PUBLIC_KEY,
    adapters_beside,
    open_ledger,
    open_publisher,
    open_registry,
    open_roots,
)
from offramp.deploy.serve.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(publish)
    app.command()(promote)
    app.command()(rollback)
    app.command()(status)
    app.command()(watch)


def publish(
    policy: Annotated[Path, typer.Argument(help="Bundle folder, such as runs/x/policies/chosen.")],
    serve: Annotated[
        bool, typer.Option("--promote/--no-promote", help="Serve it at once.")
    ] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Publish it although no certificate bounds it.")
    ] = False,
    guardrail: Annotated[
        list[str] | None,
        typer.Option(
            help="Bound at which a worker trips, like max_disagreement=0.1, or moves to a safer "
            "certified setting, like adapt_above=0.05; repeatable."
        ),
    ] = None,
    translators: Annotated[
        Path | None,
        typer.Option(
            help="Folder of `offramp tune` that its exits are read through.",
            show_default="what lies in the bundle's folder",
        ),
    ] = None,
    channel: Channel = None,
) -> None:
    """Sign a policy as the next generation and upload it, with the adapters that it names.

    It needs a certificate (`offramp calibrate`), or --uncertified; full depth needs neither.
    """
    bundle = PolicyBundle.load(policy)
    require_said(bundle.manifest, uncertified)
    guardrails = parse_guardrails(guardrail or [])
    limit_mb = Settings.from_environment(channel=channel).max_adapter_mb
    adapters = adapters_beside(bundle, policy, translators, limit_mb)
    with _publisher(channel) as (publisher, _):
        release = release_bundle(
            publisher, bundle, uncertified=uncertified, guardrails=guardrails, adapters=adapters
        )
        if adapters is not None:
            index = adapters.index
            say(f"adapters {index.digest[:12]} travel with it, {index.size / MIB:.1f} MiB")
        say(
            f"generation {release.generation} published ({release.digest[:12]}), "
            f"{standing(bundle.manifest)}"
        )
        if serve:
            publisher.promote(release.generation)
            console.print(f"generation {release.generation} promoted")


def promote(
    generation: Annotated[
        int | None, typer.Argument(min=1, help="A published generation.", show_default=False)
    ] = None,
    percent: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Share of the requests: a canary, or its next step."),
    ] = None,
    channel: Channel = None,
) -> None:
    """Make a published generation the one that workers run.

    With --percent its policy serves a share of the requests, as a new generation. Without
    GENERATION that is the canary's policy, or the one published last.
    """
    if generation is None and percent is None:
        raise typer.BadParameter("Name one, or give --percent", param_hint="generation")
    with _publisher(channel) as (publisher, registry):
        if percent is not None:
            publisher.roll_out(percent, generation)
        elif generation is not None:
            publisher.promote(generation)
            console.print(f"generation {generation} promoted")
        say(head_line(registry, Settings.from_environment(channel=channel)))


def rollback(
    to: Annotated[
        int | None,
        typer.Option(min=1, help="Generation to return to.", show_default="the last good"),
    ] = None,
    ready: Annotated[
        bool,
        typer.Option("--ready", help="Sign it only, for `watch` to serve should workers trip."),
    ] = False,
    channel: Channel = None,
) -> None:
    """Serve an older policy again, as a new generation."""
    with _publisher(channel) as (publisher, _):
        release = publisher.rollback(to, serve=not ready)
        generation, policy = release.generation, release.digest[:12]
        if not ready:
            console.print(f"generation {generation} serves policy {policy} again")
            return
        say(f"generation {generation} stands ready to serve policy {policy} again")
        if not publisher.signer.suffices:
            path = open_ledger(Settings.from_environment(channel=channel)).release_path(generation)
            say(f"it takes more signatures: offramp keys sign {path} --key KEY")


def status(channel: Channel = None) -> None:
    """Show the head and what each worker says it runs."""
    settings = Settings.from_environment(channel=channel)
    registry = open_registry(settings)
    try:
        say(head_line(registry, settings))
        acks = registry.acks()
    finally:
        registry.close()
    table = Table("worker", "state", "generation", "digest", "setting", "seconds ago", "reason")
    for ack in sorted(acks, key=lambda each: each.worker):
        age_s, point = f"{time.time() - ack.at:.1f}", points_of(ack) or UNKNOWN
        runs = (str(ack.generation), ack.digest[:12], point)
        table.add_row(ack.worker, ack.state.value, *runs, age_s, ack.reason)
    console.print(table)
    console.print(tracks_table(acks))


def watch(
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    trips: Annotated[
        int, typer.Option(min=1, help="Tripped workers that roll the release back.")
    ] = 2,
    steps: Annotated[
        Path | None,
        typer.Option(help="YAML file of steps and bounds by which a canary goes on by itself."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
    channel: Channel = None,
) -> None:
    """Stay and watch: renew the timestamp, roll back what workers trip on, move canaries on."""
    plan = None if steps is None else Steps.load(steps)
    # Three looks may fail before workers take the silence for a freeze.
    ttl_s = STAMP_TTL_S if once else max(60.0, 4 * every)
    with _publisher(channel, ttl_s) as (publisher, registry):
        overseer = Overseer(publisher, registry, trips, plan)
        while True:
            try:
                if story := overseer.look():
                    say(story)
            except (RegistryUnavailableError, PromoteConflictError) as error:
                if once:
                    raise
                say(f"{error} Trying again.")
            if once:
                return
            time.sleep(every)


def standing(manifest: Manifest) -> str:
    """What stands behind a release, in one sentence."""
    certificate = manifest.certificate
    if certificate is None:
        return manifest.guarantee
    return f"{manifest.guarantee}: {certificate.statement}"


def head_line(registry: PolicyRegistry, settings: Settings) -> str:
    """Say in a sentence what the head of the channel is, its signature checked."""
    path = settings.home / PUBLIC_KEY
    try:
        head = registry.head()
        if head is None:
            return "head: none"
        if not path.exists():
            return f"head: says generation {head.generation}; {path} is not here to check that"
        manifest = open_head(head, open_roots(settings).newest, settings.channel)
        rollout = manifest.rollout
        line = f"head: generation {manifest.generation}, {standing(manifest)}"
        if manifest.adapters:
            line += f", through adapters {manifest.adapters[:12]}"
        if rollout.is_canary:
            line += (
                f"; a canary in shadow: it serves no request, some are repeated under it unseen, "
                f"and generation {rollout.stable_generation} serves all"
                if rollout.is_shadow
                else f"; a canary: it serves {rollout.percent:g}% of the requests, "
                f"generation {rollout.stable_generation} the others"
            )
        return line
    except PolicyRefusedError as error:
        return (
            f"head: forged or damaged ({error.reason.value}: {error.detail}); workers keep what "
            "they run; offramp promote GENERATION puts the ledger's in its place"
        )


def parse_guardrails(bounds: list[str]) -> dict[str, float]:
    """Bounds by name, from NAME=NUMBER.

    Raises:
        ConfigError: an unknown name, or no number in its range.
    """
    parsed: dict[str, float] = {}
    for bound in bounds:
        name, _, number = bound.partition("=")
        if name not in GUARDRAILS:
            known = ", ".join(GUARDRAILS)
            raise ConfigError("guardrail", f"{name!r} is unknown", f"Use one of {known}")
        try:
            parsed[name] = float(number)
        except ValueError as error:
            raise ConfigError(name, f"{number!r} is no number", "Give NAME=NUMBER") from error
    Guardrails(**parsed)
    return parsed


def release_bundle(
    publisher: Publisher,
    bundle: PolicyBundle,
    *,
    uncertified: bool = False,
    guardrails: dict[str, float] | None = None,
    adapters: AdapterSource | None = None,
) -> Head:
    """Sign a draft as it is.

    Raises:
        ConfigError: it is uncertified without being called so, or the other way round.
    """
    manifest = bundle.manifest
    return publisher.release(
        bundle.packed,
        model=manifest.model,
        tokenizer=manifest.tokenizer,
        training=manifest.training,
        metrics=manifest.metrics,
        certificate=manifest.certificate,
        uncertified=uncertified,
        guardrails=guardrails,
        adapters=adapters,
    )


@contextmanager
def _publisher(
    channel: str | None, stamp_ttl_s: float = STAMP_TTL_S
) -> Iterator[tuple[Publisher, RedisRegistry]]:
    settings = Settings.from_environment(channel=channel)
    registry = open_registry(settings)
    if not (settings.home / KEY).exists():
        console.print(f"new signing key in {settings.home}; workers must trust it (serve --trust)")
    try:
        yield open_publisher(settings, registry, stamp_ttl_s), registry
    finally:
        registry.close()
