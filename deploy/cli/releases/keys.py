"""Run ``offramp keys``: make, change and trust the keys that sign releases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.errors import ConfigError
from offramp.controller.keys.envelopes import key_id_of
from offramp.controller.keys.key_files import load_or_create_key, load_public_keys, save_public_keys
from offramp.deploy.cli.console import say
from offramp.deploy.cli.releases import roots
from offramp.deploy.serve.publishing import KEY, NEXT_KEY, PUBLIC_KEY, ROOTS, open_roots, trust
from offramp.deploy.serve.settings import Settings

_keys = typer.Typer(
    help="Make, change and trust the keys that sign releases.", no_args_is_help=True
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    roots.add_to(_keys)
    app.add_typer(_keys, name="keys")


@_keys.command()
def new(
    out: Annotated[
        Path | None,
        typer.Option(help="Make a key apart, such as a root key kept offline: a file for it."),
    ] = None,
) -> None:
    """Make the key that signs; if there is one, make the one that follows it. Both are trusted."""
    if out is not None:
        _make_apart(out)
        return
    settings = Settings.from_environment()
    is_first = not (settings.home / KEY).exists()
    key = load_or_create_key(settings.home / (KEY if is_first else NEXT_KEY))
    trust(settings, key.public_bytes)
    path = settings.home / PUBLIC_KEY
    if is_first:
        say(f"key {key.key_id} signs from now on; workers must trust {path} (serve --trust)")
        return
    if (settings.home / ROOTS).exists():
        public = settings.home / f"publisher-{key.key_id}.pub"
        save_public_keys(public, key.public_bytes)
        say(
            f"key {key.key_id} is made, its public part {public}: list it in the next root "
            "(offramp keys draft), then run offramp keys rotate"
        )
        return
    say(
        f"key {key.key_id} is trusted in {path}: give that file to every worker and restart it, "
        "then run offramp keys rotate"
    )


def _make_apart(path: Path) -> None:
    if path.exists():
        raise ConfigError("out", f"{path} is there already", "Name a file that is not")
    key = load_or_create_key(path)
    public = path.with_suffix(".pub")
    save_public_keys(public, key.public_bytes)
    say(f"key {key.key_id}: {path} is private; hand on {public}")


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
    root = open_roots(settings).newest
    if key.key_id not in root.release.keys:
        problem = f"root {root.version} does not list {key.key_id} for releases"
        raise ConfigError("keys", problem, "Have the next root list it: offramp keys draft")
    retired = settings.home / f"publisher-{old.key_id}.pem"
    retired.unlink(missing_ok=True)
    retired.hardlink_to(current)  # a crash between the two leaves the old key in both places
    ready.replace(current)
    end = "sign a root without it" if root.version else f"offramp keys distrust {old.key_id}"
    say(
        f"key {key.key_id} signs from now on; {retired} is not needed any more. Promote the served "
        "generation again, so that its timestamp is the new key's. Once no release of the old key "
        f"is to run: {end}"
    )


@_keys.command(name="trust")
def trust_file(
    file: Annotated[Path, typer.Argument(help="Public keys as PEM, or the next root, signed.")],
) -> None:
    """Trust the public keys of a file, too; or take a root, which workers then follow by Redis."""
    settings = Settings.from_environment()
    if roots.is_root(file):
        roots.take(settings, file)
        return
    _require_no_root(settings)
    for key_id in trust(settings, *load_public_keys(file)):
        say(f"trusted: {key_id}")


@_keys.command()
def distrust(
    key_id: Annotated[str, typer.Argument(help="Id of a trusted key: 16 hex digits.")],
) -> None:
    """Trust a key no longer. Workers go on until they start again."""
    settings = Settings.from_environment()
    _require_no_root(settings)
    path, signing = settings.home / PUBLIC_KEY, settings.home / KEY
    known = load_public_keys(path)
    kept = [each for each in known if key_id_of(each) != key_id]
    if len(kept) == len(known):
        raise ConfigError("key_id", f"{key_id!r} is not trusted", "See offramp keys list")
    if signing.exists() and load_or_create_key(signing).key_id == key_id:
        raise ConfigError("key_id", f"{key_id!r} is the key that signs", "Rotate it first")
    save_public_keys(path, *kept)
    say(f"no longer trusted: {key_id}")


def _require_no_root(settings: Settings) -> None:
    if (settings.home / ROOTS).exists():
        remedy = "Draft the next one, have it signed, and run offramp keys trust FILE"
        raise ConfigError("keys", "a root says whose signatures count", remedy)


@_keys.command(name="list")
def list_keys() -> None:
    """List the keys that are trusted, and what each does."""
    settings = Settings.from_environment()
    uses = {}
    for name, use in ((NEXT_KEY, "ready to sign (keys rotate)"), (KEY, "signs")):
        if (settings.home / name).exists():
            uses[load_or_create_key(settings.home / name).key_id] = use
    root = open_roots(settings).newest
    if root.version:
        say(roots.described(root))
        for key_id in {**root.root.keys, **root.release.keys, **root.timestamp.keys}:
            use = f", {uses[key_id]}" if key_id in uses else ""
            say(f"{key_id} {roots.allowed(root, key_id)}{use}")
        return
    for key_id in root.release.keys:
        say(f"{key_id} {uses.get(key_id, 'trusted')}")
