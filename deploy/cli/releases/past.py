"""Run ``offramp history`` and ``diff``: what the ledger says was released, and how two differ."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.records import SignedRecords
from offramp.deploy.cli.console import console, say
from offramp.deploy.serve.publishing import open_ledger, open_roots
from offramp.deploy.serve.settings import Settings

NOISE = ("generation", "created_at", "shapes", "size", "adapter_index")
"""Fields of a manifest that differ or follow anyway."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(history)
    app.command()(diff)


def history() -> None:
    """List every release of the channel, newest first, as the ledger has them."""
    settings = Settings.from_environment()
    ledger = open_ledger(settings)
    records = SignedRecords(ledger, open_roots(settings).newest, settings.channel)
    promoted = ledger.promotions()
    table = Table("generation", "signed at", "policy", "kind", "guarantee", "served", "note")
    for generation in reversed(ledger.generations()):
        try:
            manifest = records.manifest(generation)
        except PolicyRefusedError as error:  # it waits for signatures, or its key was revoked
            note = f"not trusted ({error.reason.value}: {error.detail})"
            table.add_row(str(generation), *"–––––", note)
            continue
        served = (
            "now"
            if generation == ledger.promoted()
            else "before"
            if generation in promoted
            else "no"
        )
        rollout = manifest.rollout
        note = f"in place of {manifest.rollback_of}" if manifest.rollback_of else ""
        if rollout.is_canary:
            note = f"{rollout.percent:g}% beside {rollout.stable_generation}"
        if manifest.adapters:
            note += f"{'; ' if note else ''}adapters {manifest.adapters[:12]}"
        signed_at = datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            str(generation), signed_at, manifest.digest[:12], manifest.kind, manifest.guarantee,
            served, note,
        )  # fmt: skip
    console.print(table)


def diff(
    old: Annotated[int, typer.Argument(min=1, help="A released generation.")],
    new: Annotated[int, typer.Argument(min=1, help="Another one.")],
) -> None:
    """Show how two releases differ, field by field."""
    settings = Settings.from_environment()
    records = SignedRecords(open_ledger(settings), open_roots(settings).newest, settings.channel)
    fields = [_fields(records.manifest(generation)) for generation in (old, new)]
    names = [name for name in fields[0] | fields[1] if fields[0].get(name) != fields[1].get(name)]
    if not names:
        say(f"generations {old} and {new} differ in nothing but number and date")
        return
    table = Table("field", f"generation {old}", f"generation {new}")
    for name in names:
        table.add_row(name, *(_shown(each.get(name)) for each in fields))
    console.print(table)


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
