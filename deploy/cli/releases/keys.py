"""Run ``offramp keys``: make, change and trust the keys that sign releases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.errors import ConfigError
from offramp.controller.release.signing import (
    key_id_of,
    load_or_create_key,
    load_public_keys,
    save_public_keys,
)
from offramp.deploy.cli.console import say
from offramp.deploy.serve.publishing import KEY, NEXT_KEY, PUBLIC_KEY, trust
from offramp.deploy.serve.settings import Settings

_keys = typer.Typer(
    help="Make, change and trust the keys that sign releases.", no_args_is_help=True
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(_keys, name="keys")


@_keys.command()
def new() -> None:
    """Make the key that signs; if there is one, make the one that follows it. Both are trusted."""
    settings = Settings.from_environment()
    is_first = not (settings.home / KEY).exists()
    key = load_or_create_key(settings.home / (KEY if is_first else NEXT_KEY))
    trust(settings, key.public_bytes)
    path = settings.home / PUBLIC_KEY
    if is_first:
        say(f"key {key.key_id} signs from now on; workers must trust {path} (serve --trust)")
        return
    say(
        f"key {key.key_id} is trusted in {path}: give that file to every worker and restart it, "
        "then run offramp keys rotate"
    )


@_keys.command()
def rotate() -> None:
    """Sign with the key that `keys new` made ready. Releases of the old one stay valid."""
    settings = Settings.from_environment()
    ready, current = settings.home / NEXT_KEY, settings.home / KEY
    if not ready.exists():
        raise ConfigError("keys", f"{ready} is not there", "Run offramp keys new first")
    key = load_or_create_key(ready)
    old = load_or_create_key(current)
    trust(settings, old.public_bytes, key.public_bytes)
    retired = settings.home / f"publisher-{old.key_id}.pem"
    retired.unlink(missing_ok=True)
    retired.hardlink_to(current)  # a crash between the two leaves the old key in both places
    ready.replace(current)
    say(
        f"key {key.key_id} signs from now on; {retired} is not needed any more. Promote the served "
        "generation again, so that its timestamp is the new key's. Once no release of the old key "
        f"is to run: offramp keys distrust {old.key_id}"
    )


@_keys.command(name="trust")
def trust_file(file: Annotated[Path, typer.Argument(help="Public keys, as PEM.")]) -> None:
    """Trust the public keys of a file, too. Workers read them when they start."""
    settings = Settings.from_environment()
    for key_id in trust(settings, *load_public_keys(file)):
        say(f"trusted: {key_id}")


@_keys.command()
def distrust(
    key_id: Annotated[str, typer.Argument(help="Id of a trusted key: 16 hex digits.")],
) -> None:
    """Trust a key no longer. Workers go on until they start again."""
    settings = Settings.from_environment()
    path, signing = settings.home / PUBLIC_KEY, settings.home / KEY
    known = load_public_keys(path)
    kept = [each for each in known if key_id_of(each) != key_id]
    if len(kept) == len(known):
        raise ConfigError("key_id", f"{key_id!r} is not trusted", "See offramp keys list")
    if signing.exists() and load_or_create_key(signing).key_id == key_id:
        raise ConfigError("key_id", f"{key_id!r} is the key that signs", "Rotate it first")
    save_public_keys(path, *kept)
    say(f"no longer trusted: {key_id}")


@_keys.command(name="list")
def list_keys() -> None:
    """List the keys that are trusted, and what each does."""
    settings = Settings.from_environment()
    roles = {}
    for name, role in ((NEXT_KEY, "ready to sign (keys rotate)"), (KEY, "signs")):
        if (settings.home / name).exists():
            roles[load_or_create_key(settings.home / name).key_id] = role
    for public in load_public_keys(settings.home / PUBLIC_KEY):
        key_id = key_id_of(public)
        say(f"{key_id} {roles.get(key_id, 'trusted')}")
