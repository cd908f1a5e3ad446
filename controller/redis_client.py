"""Connects to Redis with bounds on every wait, and names it without its password."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from offramp.controller.errors import ConfigError


def connect(url: str, connect_s: float, socket_s: float) -> redis.Redis:
    """A client; nothing is connected yet.

    Args:
        url: redis://, rediss:// or unix:// address.
        connect_s: Longest wait for a connection.
        socket_s: Longest wait for an answer.

    Raises:
        ConfigError: an unusable url.
    """
    options: dict[str, Any] = {
        "socket_timeout": socket_s,
        # A retry inside redis-py would repeat a promotion blindly; its default (0 to 10) varies by
        # version and by constructor.
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if not url.startswith("unix://"):
        options["socket_connect_timeout"] = connect_s
    try:
        return redis.Redis.from_url(url, **options)
    except ValueError as error:
        remedy = "Use redis://, rediss:// or unix://"
        raise ConfigError("REDIS_URL", f"{without_password(url)}: {error}", remedy) from error


def without_password(url: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
