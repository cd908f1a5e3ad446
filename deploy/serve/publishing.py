"""The publisher that the command line and the demo use: key and ledger under one home folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from offramp.controller.adapters.adapter_folder import DESCRIPTION, HEADS_KIND, KEPT, find_adapters
from offramp.controller.adapters.adapter_index import AdapterSource
from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.keys.envelopes import key_id_of
from offramp.controller.keys.key_files import load_or_create_key, load_public_keys, save_public_keys
from offramp.controller.keys.root import load_root
from offramp.controller.keys.root_chain import RootChain
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.ledger import FolderLedger, Ledger
from offramp.controller.release.publisher import STAMP_TTL_S, Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import PolicyRegistry
from offramp.deploy.serve.settings import Settings

KEY = "publisher.pem"
NEXT_KEY = "publisher-next.pem"
PUBLIC_KEY = "publisher.pub"

ROOTS = "roots"
"""Folder of the roots that followed the keys in PUBLIC_KEY."""


PATIENCE_S = 5.0
"""Longest wait of a command for an answer: unlike workers, it holds nobody up by waiting."""


def open_registry(settings: Settings) -> RedisRegistry:
    """Connect to the registry that REDIS_URL names.

    Raises:
        ConfigError: REDIS_URL is not set.
        RegistryUnavailableError: nobody answers there.
    """
    if settings.redis_url is None:
        raise ConfigError(
            "REDIS_URL",
            "is not set",
            "Set it to the server that the workers follow (offramp serve prints its own)",
        )
    registry = RedisRegistry(settings.redis_url, settings.channel, PATIENCE_S)
    with contextlib.suppress(PolicyRefusedError):  # somebody answers, whatever lies there
        registry.head()
    return registry


def open_publisher(
    settings: Settings, registry: PolicyRegistry, stamp_ttl_s: float = STAMP_TTL_S
) -> Publisher:
    """The channel's publisher, with a new key at first use.

    Args:
        settings: Name home folder, channel and epoch.
        registry: Where workers look.
        stamp_ttl_s: Seconds that a timestamp vouches for the head.

    Raises:
        ConfigError: the key or the ledger is unusable.
    """
    key = load_or_create_key(settings.home / KEY)
    trust(settings, key.public_bytes)
    roots = open_roots(settings)
    return Publisher(
        registry,
        FolderLedger(settings.home / "ledger" / settings.channel),
        key,
        settings.channel,
        epoch=settings.epoch,
        stamp_ttl_s=stamp_ttl_s,
        trusted=roots.newest,
        roots=dict(roots.envelopes()),
    )


def open_ledger(settings: Settings) -> Ledger:
    """The channel's ledger, to be read.

    Raises:
        ConfigError: there is none.
    """
    folder = settings.home / "ledger" / settings.channel
    if not folder.exists():
        raise ConfigError(
            "ledger", f"{folder} is not there", "Set OFFRAMP_HOME and OFFRAMP_CHANNEL"
        )
    return FolderLedger(folder)


def adapters_beside(
    bundle: PolicyBundle, folder: Path, given: Path | None, limit_mb: float
) -> AdapterSource | None:
    """The adapters that are to travel with a bundle's policy; None if it names none.

    Args:
        bundle: The policy.
        folder: Where the bundle lies; adapters are looked for there, and in ``translators`` in it
            and beside it.
        given: A folder that ``offramp tune`` wrote, to be looked at instead.
        limit_mb: Most MiB that they may have.

    Raises:
        ConfigError: they are not there, damaged, too large, or not those that the policy names.
    """
    named = bundle.manifest.adapters
    kind = "heads" if bundle.manifest.training.get("task") == HEADS_KIND else "adapters"
    within = [folder, folder / KEPT]
    found = given or find_adapters(named, *within, folder.resolve().parent / KEPT)
    found = found or next((place for place in within if (place / DESCRIPTION).exists()), None)
    if found is None:
        if not named:
            return None
        raise ConfigError(
            "translators",
            f"the policy was recorded through the {kind} {named[:12]}…, and neither {folder} "
            f"nor a folder {KEPT} in it or beside it holds them",
            "Name their folder with --translators",
        )
    source = AdapterSource.open(found, limit_mb)
    if named not in ("", source.index.digest):
        raise ConfigError(
            "translators",
            f"{found} holds the {kind} {source.index.digest[:12]}…, and the policy was recorded "
            f"through {named[:12]}…",
            "Name the folder that it was recorded with",
        )
    return source


def trust(settings: Settings, *public: bytes) -> list[str]:
    """Add raw public keys to those that publisher and workers begin with; ids of all of them.

    Once a root has followed them nothing is added: it alone says whose signatures count.

    Raises:
        ConfigError: the file of trusted keys is unusable.
    """
    path = settings.home / PUBLIC_KEY
    known = load_public_keys(path) if path.exists() else []
    added = [each for each in dict.fromkeys(public) if each not in known]
    if added and not (settings.home / ROOTS).exists():
        save_public_keys(path, *known, *added)
        known += added
    return list(map(key_id_of, known))


def open_roots(settings: Settings) -> RootChain:
    """The root that is in force here: the trusted keys, and what was signed to follow them.

    Raises:
        ConfigError: the file of trusted keys is unusable, or not what the roots began with.
    """
    folder = settings.home / ROOTS
    chain = RootChain(load_root(settings.home / PUBLIC_KEY), folder)
    is_other = folder.exists() and chain.newest.version == 0
    if is_other or not chain.is_whole:
        problem = f"those in {folder} are damaged, or did not begin with {PUBLIC_KEY} as it is now"
        raise ConfigError("roots", problem, f"Put {folder} and {PUBLIC_KEY} back as they were")
    return chain


def public_key_path(settings: Settings) -> Path:
    """The public key that workers are to trust; made with its key if there is none yet."""
    path = settings.home / PUBLIC_KEY
    if not path.exists():
        trust(settings, load_or_create_key(settings.home / KEY).public_bytes)
    return path
