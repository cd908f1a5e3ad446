"""Connects to Redis with bounds on every wait, and names it without its password."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from offramp.controller.errors import ConfigError

SENTINELS = {"redis+sentinel": False, "rediss+sentinel": True}
"""Schemes of addresses that name sentinels, and whether all speak TLS."""

SCHEMES = ("redis", "rediss", "unix", *SENTINELS)
"""Schemes of addresses that ``connect`` takes."""


def connect(url: str, connect_s: float, socket_s: float) -> redis.Redis:
    """A client; nothing is connected yet.

    Args:
        url: redis://, rediss:// or unix:// address; or that of sentinels, who are asked at each new
            connection which server is the primary: redis+sentinel://USER:WORD@HOST:PORT,…/NAME/DB,
            where user and word are the servers' and NAME is the primary's.
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
    parts = urlsplit(url)
    if parts.scheme != "unix":
        options["socket_connect_timeout"] = connect_s
    try:
        if parts.scheme in SENTINELS:
            return _primary(parts, connect_s, options)
        return redis.Redis.from_url(url, **options)
    except ValueError as error:
        remedy = f"Use {', '.join(f'{each}://' for each in SCHEMES)}"
        raise ConfigError("REDIS_URL", f"{without_password(url)}: {error}", remedy) from error


def _primary(parts: SplitResult, sentinel_s: float, options: dict[str, Any]) -> redis.Redis:
    login, _, hosts = parts.netloc.rpartition("@")
    user, _, word = login.partition(":")
    name, _, number = parts.path.removeprefix("/").partition("/")
    if not name:
        raise ValueError("it names no primary: end it with /NAME")
    encrypted = {"ssl": True} if SENTINELS[parts.scheme] else {}
    # redis-py annotates its sentinels in part.
    sentinels = Sentinel(  # type: ignore[no-untyped-call]
        [_host_and_port(each) for each in hosts.split(",")],
        sentinel_kwargs={**options, **encrypted, "socket_timeout": sentinel_s},
    )
    known = {"username": unquote(user) or None, "password": unquote(word) or None}
    client: redis.Redis = sentinels.master_for(  # type: ignore[no-untyped-call]
        name, db=int(number or 0), **known, **options, **encrypted
    )
    return client


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port is None:
        raise ValueError(f"{text!r} is no sentinel's HOST:PORT")
    return parts.hostname, parts.port


def without_password(url: str) -> str:
    """An address as it may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
