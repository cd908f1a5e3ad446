"""Runs ``offramp keys draft`` and ``sign``: roots that list who may sign, held by offline keys."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.keys.envelopes import (
    RELEASE_MAGIC,
    ROOT_MAGIC,
    SEVERAL_MAGIC,
    SignedEnvelope,
)
from offramp.controller.keys.key_files import load_or_create_key, load_public_keys
from offramp.controller.keys.root import Role, Root
from offramp.controller.release.manifest import Manifest
from offramp.deploy.cli.console import say
from offramp.deploy.serve.publishing import KEY, open_registry, open_roots
from offramp.deploy.serve.settings import Settings

DAY_S = 86400.0

Keys = Annotated[Path | None, typer.Option(help="PEM file of public keys.", show_default="as now")]
Threshold = Annotated[
    int | None, typer.Option(min=1, help="Signatures that it takes.", show_default="as now")
]


def add_to(keys: typer.Typer) -> None:
    """Register the commands."""
    keys.command()(draft)
    keys.command()(sign)


def draft(
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
    roots: Keys = None,
    root_threshold: Threshold = None,
    releasers: Keys = None,
    release_threshold: Threshold = None,
    timestamps: Keys = None,
    expires_days: Annotated[
        float, typer.Option(min=1, help="Days after which nothing new is believed under it.")
    ] = 365,
) -> None:
    """Write the next root, unsigned: who may sign roots, releases and timestamps."""
    settings = Settings.from_environment()
    old = open_roots(settings).newest
    now = time.time()
    root = Root(
        version=old.version + 1,
        created_at=now,
        expires_at=now + DAY_S * expires_days,
        root=_changed(old.root, roots, root_threshold),
        release=_changed(old.release, releasers, release_threshold),
        timestamp=_changed(old.timestamp, timestamps, None),
    )
    write_durably(file, SignedEnvelope(ROOT_MAGIC, {}, root.to_bytes()).to_bytes())
    say(
        f"{file}: {described(root)}. Have it signed by {old.root.threshold} of the root keys of "
        f"root {old.version} and {root.root.threshold} of its own (offramp keys sign {file} --key "
        f"KEY), then run offramp keys trust {file}"
    )


def _changed(old: Role, keys: Path | None, threshold: int | None) -> Role:
    public = list(old.keys.values()) if keys is None else load_public_keys(keys)
    return Role.of(public, threshold or min(old.threshold, len(public)))


def sign(
    file: Annotated[Path, typer.Argument(help="A root, or a release of the ledger.")],
    key: Annotated[Path, typer.Option(help="Private key, as PEM.")],
) -> None:
    """Sign a root, or a release beside those who signed it before; it says what it signs."""
    if not key.exists():
        raise ConfigError("key", f"{key} is not there", "Make one: offramp keys new --out FILE")
    try:
        envelope = SignedEnvelope.from_bytes(file.read_bytes())
        what = _named(envelope)
    except (OSError, PolicyRefusedError) as error:
        remedy = "Name what offramp keys draft wrote, or a release of the ledger"
        raise ConfigError("file", f"{file} cannot be signed: {error}", remedy) from error
    private = load_or_create_key(key)
    signed = private.cosign(envelope)
    write_durably(file, signed.to_bytes())
    say(f"{private.key_id} signed {what}; signatures: {', '.join(sorted(signed.signatures))}")


def _named(envelope: SignedEnvelope) -> str:
    """What an envelope holds, in words, so that nobody signs blindly."""
    if envelope.magic == ROOT_MAGIC:
        return described(Root.from_bytes(envelope.payload))
    if envelope.magic != RELEASE_MAGIC:
        raise ConfigError("file", "it is neither a root nor a release", "Name one of these")
    release = Manifest.from_bytes(envelope.payload)
    return (
        f"generation {release.generation} of channel {release.channel}: policy "
        f"{release.digest[:12]}, {release.kind}, {release.guarantee}, for "
        f"{release.rollout.percent:g}% of the requests"
    )


def is_root(file: Path) -> bool:
    """Whether a file holds a root, signed or not, and no PEM."""
    try:
        return file.read_bytes()[:4] in (ROOT_MAGIC, SEVERAL_MAGIC)
    except OSError:
        return False  # whoever reads it next says so


def take(settings: Settings, file: Path) -> None:
    """Put a signed root in force here, and where workers look for it.

    Raises:
        ConfigError: it is not signed by enough, does not follow, or cannot be kept.
        RegistryUnavailableError: it is in force here, and workers were not told.
    """
    chain = open_roots(settings)
    try:
        envelope = SignedEnvelope.from_bytes(file.read_bytes())
        key = settings.home / KEY
        if chain.newest.version == 0 and key.exists():
            # The plain keys hand over: whoever holds them here could sign it by hand as well.
            envelope = load_or_create_key(key).cosign(envelope)
        raw = envelope.to_bytes()
        chain.add(raw)
    except (OSError, PolicyRefusedError) as error:
        remedy = "Have it signed by enough root keys (offramp keys sign)"
        raise ConfigError("root", f"{file} is not taken: {error}", remedy) from error
    say(f"in force: {described(chain.newest)}")
    if settings.redis_url is None:
        say("REDIS_URL is not set: the next publish or promote tells the workers")
        return
    registry = open_registry(settings)
    try:
        for version, each in chain.envelopes():
            registry.put_root(version, each)
    finally:
        registry.close()
    say("workers of this channel follow at their next poll; those of others once one is promoted")


def described(root: Root) -> str:
    """A root in a clause."""
    roles = [("root", root.root), ("release", root.release), ("timestamp", root.timestamp)]
    said = ", ".join(f"{name} {role.threshold} of {len(role.keys)}" for name, role in roles)
    ends = "never expires"
    if root.expires_at is not None:
        ends = f"expires {datetime.fromtimestamp(root.expires_at, UTC):%Y-%m-%d}"
    return f"root {root.version} ({said} keys, {ends})"


def allowed(root: Root, key_id: str) -> str:
    """What a key may sign under a root."""
    roles = {"roots": root.root, "releases": root.release, "timestamps": root.timestamp}
    return "may sign " + " and ".join(name for name, role in roles.items() if key_id in role.keys)
