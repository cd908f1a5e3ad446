"""Run ``offramp history`` and ``diff``: what the ledger says was released, and how two differ."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.records import SignedRecords
from offramp.deploy.cli.console import console, say
from offramp.deploy.cli.releases.channel_option import Channel
from offramp.deploy.serve.publishing import open_ledger, open_roots
from offramp.deploy.serve.settings import Settings

NOISE = ("generation", "created_at", "shapes", "size", "adapter_index")
"""Fields of a manifest that differ or follow anyway."""

COLUMNS = ("generation", "signed at", "policy", "kind", "guarantee", "served", "note")
"""What a line of the history says."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(history)
    app.command()(diff)


@dataclass(frozen=True, slots=True)
class PastRelease:
    """One line of the ledger.

    Attributes:
        generation: Number of the release.
        manifest: What was signed; None if its signatures do not suffice.
        served: "now", "before" or "no"; a dash if it is not trusted.
        note: Says what it replaced, or beside what it served, or why it is not trusted.
    """

    generation: int
    manifest: Manifest | None
    served: str
    note: str

    @property
    def cells(self) -> tuple[str, ...]:
        """Generation, date in UTC, policy, kind, guarantee, served, note."""
        manifest = self.manifest
        if manifest is None:
            return (str(self.generation), *"–––––", self.note)
        signed_at = datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        about = (manifest.digest[:12], manifest.kind, manifest.guarantee)
        return (str(self.generation), signed_at, *about, self.served, self.note)


def history(channel: Channel = None) -> None:
    """List every release of the channel, newest first, as the ledger has them."""
    table = Table(*COLUMNS)
    for release in past_releases(Settings.from_environment(channel=channel)):
        table.add_row(*release.cells)
    console.print(table)


def past_releases(settings: Settings) -> list[PastRelease]:
    """Every release of the channel, newest first, each signature checked.

    Raises:
        ConfigError: there is no ledger here, or it is damaged.
    """
    ledger = open_ledger(settings)
    records = SignedRecords(ledger, open_roots(settings).newest, settings.channel)
    promotions = ledger.promotions()
    found = []
    for generation in reversed(ledger.generations()):
        try:
            manifest = records.manifest(generation)
        except PolicyRefusedError as error:  # it waits for signatures, or its key was revoked
            note = f"not trusted ({error.reason.value}: {error.detail})"
            found.append(PastRelease(generation, None, "–", note))
            continue
        served = "before" if generation in promotions else "no"
        if promotions and generation == promotions[-1]:
            served = "now"
        found.append(PastRelease(generation, manifest, served, _note(manifest)))
    return found


def _note(manifest: Manifest) -> str:
    rollout = manifest.rollout
    note = f"in place of {manifest.rollback_of}" if manifest.rollback_of else ""
    if rollout.is_canary:
        note = f"{rollout.percent:g}% beside {rollout.stable_generation}"
    if manifest.adapters:
        note += f"{'; ' if note else ''}adapters {manifest.adapters[:12]}"
    return note


def diff(
    old: Annotated[int, typer.Argument(min=1, help="A released generation.")],
    new: Annotated[int, typer.Argument(min=1, help="Another one.")],
    channel: Channel = None,
) -> None:
    """Show how two releases differ, field by field."""
    rows = differences(Settings.from_environment(channel=channel), old, new)
    if not rows:
        say(f"generations {old} and {new} differ in nothing but number and date")
        return
    table = Table("field", f"generation {old}", f"generation {new}")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def differences(settings: Settings, old: int, new: int) -> list[tuple[str, str, str]]:
    """Fields in which two releases differ, each with both values.

    Raises:
        ConfigError: one is not recorded.
        PolicyRefusedError: one is not trusted.
    """
    records = SignedRecords(open_ledger(settings), open_roots(settings).newest, settings.channel)
    olds, news = (_fields(records.manifest(generation)) for generation in (old, new))
    names = [name for name in olds | news if olds.get(name) != news.get(name)]
    return [(name, _shown(olds.get(name)), _shown(news.get(name))) for name in names]


def _fields(manifest: Manifest) -> dict[str, Any]:
    """A manifest's fields by dotted name, one level down."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(manifest.to_bytes()).items():
        if name in NOISE:
            continue
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": each for key, each in inner.items()} or {name: value}
    return flat


def _shown(value: Any) -> str:
    text = "–" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
