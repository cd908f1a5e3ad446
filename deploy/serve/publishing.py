"""The publisher that the command line and the demo use: key and ledger under one home folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.release.ledger import Ledger
from offramp.controller.release.publisher import STAMP_TTL_S, Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import PolicyRegistry
from offramp.controller.release.signing import load_or_create_key, save_public_key
from offramp.deploy.serve.settings import Settings

KEY = "publisher.pem"
PUBLIC_KEY = "publisher.pub"


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
    registry = RedisRegistry(settings.redis_url, settings.channel)
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
    save_public_key(settings.home / PUBLIC_KEY, key.public_bytes)
    ledger = Ledger(settings.home / "ledger" / settings.channel)
    return Publisher(
        registry, ledger, key, settings.channel, epoch=settings.epoch, stamp_ttl_s=stamp_ttl_s
    )


def public_key_path(settings: Settings) -> Path:
    """The public key that workers are to trust; made with its key if there is none yet."""
    path = settings.home / PUBLIC_KEY
    if not path.exists():
        save_public_key(path, load_or_create_key(settings.home / KEY).public_bytes)
    return path
