"""The registry on Redis.

Keys ({c} = channel; the braces are a hash tag, so one channel lives on one cluster node):

    offramp:{c}:blob:<sha256>  string        policy weights (safetensors), ≤ 8 MiB; parts of
                                             adapters (≤ 4 MiB) and the lists of them
    offramp:{c}:head           hash          gen, epoch, envelope, digest, stable: one atomic read
    offramp:{c}:fresh          string, TTL   signed timestamp: freeze alarm
    offramp:{c}:root:<version> string        signed root: whose signatures count
    offramp:{c}:events         stream ≤ 1000 gen, digest: wake-up and audit, never the truth
    offramp:{c}:ack:<worker>   hash, TTL     the fields of Ack
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any, TypeVar

import redis
from redis.exceptions import RedisError

from offramp.controller.errors import (
    ConfigError,
    OfframpError,
    PolicyRefusedError,
    PromoteConflictError,
    Refusal,
    RegistryUnavailableError,
    too_large,
)
from offramp.controller.keys.envelopes import MAX_ENVELOPE_BYTES
from offramp.controller.policies.kinds import digest_of
from offramp.controller.redis_client import connect, without_password
from offramp.controller.release.registry import MAX_EVENTS, Ack, AckState, Event, Head
from offramp.controller.watching.tally import tallies_from_json, tallies_to_json

_PROMOTE = """
-- KEYS: head, blob, events. ARGV: gen, epoch, envelope, digest, expected gen, events kept, stable.
-- Returns {gen found, problem}; the problem is '' if the head was set.
local head = redis.call('HMGET', KEYS[1], 'gen', 'epoch')
local found = tonumber(head[1] or '0') or -1
if head[2] and head[2] ~= ARGV[2] then return {found, 'another epoch'} end
if found ~= tonumber(ARGV[5]) then return {found, 'the head moved'} end
if tonumber(ARGV[1]) <= found then return {found, "the generation is not above the head's"} end
if redis.call('EXISTS', KEYS[2]) == 0 then return {found, 'the blob is missing'} end
redis.call('HSET', KEYS[1],
    'gen', ARGV[1], 'epoch', ARGV[2], 'envelope', ARGV[3], 'digest', ARGV[4], 'stable', ARGV[7])
-- Only a wake-up: workers that miss it poll.
redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'gen', ARGV[1], 'digest', ARGV[4])
return {found, ''}
"""

TIMEOUT_S = 1.0
"""Longest wait for a connection or an answer: a frozen server must not hold a worker."""

MAX_BLOCK_S = 2.0
"""Longest single blocking XREAD; its client's socket timeout is longer by TIMEOUT_S."""

RETRY_AFTER_S = (0.02, 0.08)
"""Bounds of the random pause before the one retry of a read."""

_REFUSING: dict[type[RedisError], tuple[str, str]] = {
    redis.exceptions.OutOfMemoryError: ("is out of memory", "Free some or raise its maxmemory"),
    redis.exceptions.ReadOnlyError: ("is a read-only replica", "Name the primary"),
    redis.exceptions.NoPermissionError: ("does not allow it", "Ask for the permission it names"),
    redis.exceptions.AuthenticationError: ("refuses to let us in", "Correct user and password"),
}
"""Servers that answer, but with no: what is wrong, and what to do about it."""

_CHANNEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOST = (redis.ConnectionError, redis.TimeoutError)
_T = TypeVar("_T")


class RedisRegistry:
    """One channel on one Redis server.

    Args:
        url: redis://, rediss:// or unix:// address.
        channel: Letters, digits, dot, dash and underscore; at most 64.
        timeout_s: Longest wait for a connection or an answer.

    Raises:
        ConfigError: an unusable url or channel. Nothing is connected yet.
    """

    def __init__(self, url: str, channel: str, timeout_s: float = TIMEOUT_S) -> None:
        if not _CHANNEL.fullmatch(channel):
            raise ConfigError("CHANNEL", f"{channel!r} is no name", "Use letters, digits, . _ -")
        self._prefix = f"offramp:{{{channel}}}:"
        self._place = without_password(url)
        self._client = connect(url, timeout_s, timeout_s)
        self._waiter = connect(url, timeout_s, MAX_BLOCK_S + timeout_s)
        # Each waiting thread has its own place in the stream.
        self._seen = threading.local()

    def head(self) -> Head | None:
        """See PolicyRegistry."""
        key = self._key("head")
        # Asked before it is fetched: whoever can write here could else fill a worker's memory.
        for name in ("envelope", "stable"):
            size = self._read(lambda name=name: self._client.hstrlen(key, name))  # type: ignore[misc]
            if size > MAX_ENVELOPE_BYTES:
                raise too_large("the envelope", size, MAX_ENVELOPE_BYTES)
        names = ["gen", "epoch", "envelope", "digest", "stable"]
        values = self._read(lambda: self._client.hmget(key, names))
        return None if values == [None] * 5 else _head(values)

    def discard_head(self) -> None:
        """See PolicyRegistry."""
        self._read(lambda: self._client.delete(self._key("head")))

    def put_blob(self, blob: bytes) -> str:
        """See PolicyRegistry."""
        digest = digest_of(blob)
        # Whatever else lies under this digest is damaged. To set it twice does no harm.
        self._read(lambda: self._client.set(self._key(f"blob:{digest}"), blob))
        return digest

    def get_blob(self, digest: str, max_bytes: int) -> bytes | None:
        """See PolicyRegistry."""
        return self._get(self._key(f"blob:{digest}"), "the blob", max_bytes)

    def forget_blobs(self, named: Collection[str]) -> None:
        """See PolicyRegistry."""
        start = self._key("blob:")
        keys = self._read(lambda: list(self._client.scan_iter(match=f"{start}*", count=500)))
        gone = [key for key in keys if key.decode().removeprefix(start) not in named]
        if gone:
            self._guard(lambda: self._client.unlink(*gone))

    def promote(self, head: Head, expected_generation: int) -> None:
        """See PolicyRegistry."""
        keys = [self._key("head"), self._key(f"blob:{head.digest}"), self._key("events")]
        values = [head.generation, head.epoch, head.envelope, head.digest]
        arguments: list[Any] = [*keys, *values, expected_generation, MAX_EVENTS, head.stable]
        try:
            answer: Any = self._client.eval(_PROMOTE, len(keys), *arguments)
        except RedisError as error:
            # The script may have run. A second run would meet its own head and call it a conflict.
            if self.head() == head:
                return
            raise self._unavailable(error) from error
        found, problem = answer
        if problem:
            raise PromoteConflictError(expected_generation, found, problem.decode())

    def wait(self, timeout_s: float) -> bool:
        """See PolicyRegistry."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            if self._wait_once(min(max(left_s, 0.0), MAX_BLOCK_S)):
                return True
            if left_s <= MAX_BLOCK_S:
                return False

    def _wait_once(self, block_s: float) -> bool:
        seen: dict[Any, Any] = {self._key("events"): getattr(self._seen, "id", "0-0")}
        block_ms = max(1, int(block_s * 1000))  # 0 would block for ever
        answer: Any = self._guard(lambda: self._waiter.xread(seen, block=block_ms))
        if not answer:
            return False
        self._seen.id = answer[0][1][-1][0]
        return True

    def acknowledge(self, ack: Ack, ttl_s: float) -> None:
        """See PolicyRegistry."""
        key = self._key(f"ack:{ack.worker}")
        said = {"at": repr(ack.at), "tallies": tallies_to_json(ack.tallies)}
        fields: dict[Any, Any] = asdict(ack) | said

        def write() -> None:
            with self._client.pipeline(transaction=True) as pipe:
                pipe.hset(key, mapping=fields)
                pipe.pexpire(key, _milliseconds(ttl_s))
                pipe.execute()

        self._guard(write)

    def acks(self) -> list[Ack]:
        """See PolicyRegistry. Records that are no acknowledgement are passed over."""
        pattern = self._key("ack:*")
        keys = sorted(self._read(lambda: list(self._client.scan_iter(pattern, count=500))))
        records = [self._read(lambda key=key: self._client.hgetall(key)) for key in keys]  # type: ignore[misc]
        return [ack for ack in map(ack_of, records) if ack is not None]

    def stamp(self, envelope: bytes, ttl_s: float) -> None:
        """See PolicyRegistry."""
        key = self._key("fresh")
        self._guard(lambda: self._client.set(key, envelope, px=_milliseconds(ttl_s)))

    def fresh(self) -> bytes | None:
        """See PolicyRegistry."""
        return self._get(self._key("fresh"), "the timestamp", MAX_ENVELOPE_BYTES)

    def put_root(self, version: int, envelope: bytes) -> None:
        """See PolicyRegistry."""
        key = self._key(f"root:{version}")
        self._read(lambda: self._client.set(key, envelope))

    def root(self, version: int) -> bytes | None:
        """See PolicyRegistry."""
        return self._get(self._key(f"root:{version}"), "the root", MAX_ENVELOPE_BYTES)

    def events(self, count: int) -> list[Event]:
        """See PolicyRegistry."""
        key = self._key("events")
        entries = self._read(lambda: self._client.xrevrange(key, count=count))
        return [
            Event(int(entry[b"gen"]), entry[b"digest"].decode(), int(place.split(b"-")[0]) / 1000)
            for place, entry in entries
        ]

    def forget(self) -> None:
        """Delete every key of the channel; for channels that were only ever meant to be short.

        Raises:
            RegistryUnavailableError: nobody answers.
        """
        keys = self._read(lambda: list(self._client.scan_iter(match=f"{self._prefix}*")))
        if keys:
            self._guard(lambda: self._client.delete(*keys))

    def close(self) -> None:
        """See PolicyRegistry."""
        self._client.close()
        self._waiter.close()

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _get(self, key: str, what: str, max_bytes: int) -> bytes | None:
        size = self._read(lambda: self._client.strlen(key))
        if size > max_bytes:
            raise too_large(what, size, max_bytes)
        if not size:
            return None
        # The range holds even if the value has grown since its length was asked for.
        value: bytes = self._read(lambda: self._client.getrange(key, 0, max(0, max_bytes - 1)))
        return value or None

    def _read(self, call: Callable[[], Any]) -> Any:
        """A call that may be repeated: tried again once, after a random pause."""
        try:
            return call()
        except _LOST:
            time.sleep(random.uniform(*RETRY_AFTER_S))
        except RedisError as error:
            raise self._unavailable(error) from error
        # Outside of the handler: a second failure is its own story, not the first one's context.
        return self._guard(call)

    def _guard(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except RedisError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: RedisError) -> OfframpError:
        if str(error).startswith("WRONGTYPE"):
            # Somebody wrote here who is no offramp: it is as worthless as unsigned bytes.
            return PolicyRefusedError(Refusal.BAD_FORMAT, f"a key is of another type: {error}")
        problem, remedy = next(
            (said for kind, said in _REFUSING.items() if isinstance(error, kind)),
            ("does not serve", "Start Redis or correct the address"),
        )
        return RegistryUnavailableError("REDIS_URL", f"{self._place} {problem}: {error}", remedy)


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _head(values: list[bytes | None]) -> Head:
    generation, epoch, envelope, digest, stable = (value or b"" for value in values)
    try:
        return Head(int(generation), int(epoch), envelope, digest.decode("ascii"), stable)
    except ValueError as error:
        raise PolicyRefusedError(Refusal.BAD_FORMAT, f"the head is unreadable: {error}") from error


def ack_of(record: dict[bytes, bytes]) -> Ack | None:
    """Read an acknowledgement as Redis has it; None if it is none."""
    try:
        text: dict[str, Any] = {name.decode(): value.decode() for name, value in record.items()}
        counts = {name: int(text[name]) for name in ("generation", "about")}
        told = {"state": AckState(text["state"]), "at": float(text["at"])}
        tallies = tallies_from_json(text.get("tallies", "[]"))
        return Ack(**(text | counts | told | {"tallies": tallies}))
    except (KeyError, ValueError, TypeError):
        return None  # expired between the scan and this read, or written by somebody else
