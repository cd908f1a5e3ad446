"""Where the head of a channel is kept: the contract, and the in-memory registry.

A registry is a cache. Nothing it returns is to be trusted before its signature is checked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from offramp.controller.errors import PromoteConflictError, too_large
from offramp.controller.policies.kinds import digest_of
from offramp.controller.watching.tally import Tally

MAX_EVENTS = 1000
"""Promotions remembered for audit."""


class AckState(StrEnum):
    """What a worker says about the head."""

    ACK = "ACK"
    """It runs the head."""

    NACK = "NACK"
    """It refused the head and goes on with what it runs."""

    PREPARING = "PREPARING"
    """It takes the head in, compiling what that needs, and goes on with what it runs meanwhile."""

    STALE = "STALE"
    """It cannot tell whether there is a newer head, and goes on with what it runs."""

    TRIPPED = "TRIPPED"
    """A local guardrail took the head out of service; every token goes to full depth."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a channel serves now, as the registry says.

    Attributes:
        generation: Number of the release, from 1 on.
        epoch: Incarnation of the channel.
        envelope: The signed manifest.
        digest: SHA-256 of the blob, hex.
        stable: Beside a canary: the signed manifest of the release that serves all other requests.
    """

    generation: int
    epoch: int
    envelope: bytes
    digest: str
    stable: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What one worker runs, and what it thinks of the head.

    Attributes:
        worker: Name of the worker.
        boot: Random id of this start of the worker.
        generation: Number of the release that it runs; 0: full depth.
        digest: Names the policy that it runs; "": full depth.
        about: Generation that a TRIPPED worker took out of service; else the one that it runs.
        state: What it says about the head.
        reason: Why, beginning with the Refusal for a NACK; "" for an ACK.
        at: Unix seconds by the worker's clock.
        tallies: What the requests of its releases did, since it took the head.
    """

    worker: str
    boot: str
    generation: int
    digest: str
    about: int
    state: AckState
    reason: str
    at: float
    tallies: tuple[Tally, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """One promotion.

    Attributes:
        generation: The new head.
        digest: SHA-256 of its blob, hex.
        at: Unix seconds by the registry's clock.
    """

    generation: int
    digest: str
    at: float


@runtime_checkable
class PolicyRegistry(Protocol):
    """One channel's head, blobs, timestamp and acknowledgements.

    Every method may raise RegistryUnavailableError.
    """

    def head(self) -> Head | None:
        """What the channel serves now, in one atomic read; None before the first promotion.

        Raises:
            PolicyRefusedError: the head cannot be read (BAD_FORMAT) or is TOO_LARGE to read.
        """
        ...

    def discard_head(self) -> None:
        """Forget the head, whatever is there: for one that the channel's publisher never signed."""
        ...

    def put_blob(self, blob: bytes) -> str:
        """Keep a blob under its SHA-256, hex, in place of what may lie there; returns it."""
        ...

    def get_blob(self, digest: str, max_bytes: int) -> bytes | None:
        """The blob stored under a digest, unchecked; None if there is none.

        Raises:
            PolicyRefusedError: TOO_LARGE; the blob was not fetched.
        """
        ...

    def forget_blobs(self, named: Collection[str]) -> None:
        """Delete every blob but those of these digests."""
        ...

    def promote(self, head: Head, expected_generation: int) -> None:
        """Make a release the head, if the head is still the one expected (0: none yet).

        Raises:
            PromoteConflictError: another epoch or head, a generation not above it, or no blob.
        """
        ...

    def wait(self, timeout_s: float) -> bool:
        """Block until a promotion that this thread has not been told of; False on timeout."""
        ...

    def acknowledge(self, ack: Ack, ttl_s: float) -> None:
        """Replace the worker's acknowledgement, to be forgotten after ttl_s."""
        ...

    def acks(self) -> list[Ack]:
        """The living acknowledgements, by worker name."""
        ...

    def stamp(self, envelope: bytes, ttl_s: float) -> None:
        """Replace the signed timestamp, to be forgotten after ttl_s."""
        ...

    def fresh(self) -> bytes | None:
        """The signed timestamp, unchecked; None if there is none.

        Raises:
            PolicyRefusedError: TOO_LARGE; it was not fetched.
        """
        ...

    def put_root(self, version: int, envelope: bytes) -> None:
        """Keep a version of the signed root, in place of what may lie there."""
        ...

    def root(self, version: int) -> bytes | None:
        """A version of the signed root, unchecked; None if there is none. Raises as ``fresh``."""
        ...

    def events(self, count: int) -> list[Event]:
        """The latest promotions, newest first, for audit only."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class InMemoryRegistry:
    """A registry within one process, safe to share among threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._head: Head | None = None
        self._blobs: dict[str, bytes] = {}
        self._acks: dict[str, tuple[Ack, float]] = {}
        self._stamp: tuple[bytes, float] | None = None
        self._roots: dict[int, bytes] = {}
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._promotions = 0
        # Each waiting thread has its own place, as each Redis client has its own stream id.
        self._seen = threading.local()

    def head(self) -> Head | None:
        """See PolicyRegistry."""
        return self._head

    def discard_head(self) -> None:
        """See PolicyRegistry."""
        with self._changed:
            self._head = None

    def put_blob(self, blob: bytes) -> str:
        """See PolicyRegistry."""
        digest = digest_of(blob)
        with self._changed:
            self._blobs[digest] = blob
        return digest

    def get_blob(self, digest: str, max_bytes: int) -> bytes | None:
        """See PolicyRegistry."""
        blob = self._blobs.get(digest)
        if blob is not None and len(blob) > max_bytes:
            raise too_large("the blob", len(blob), max_bytes)
        return blob

    def forget_blobs(self, named: Collection[str]) -> None:
        """See PolicyRegistry."""
        with self._changed:
            self._blobs = {each: blob for each, blob in self._blobs.items() if each in named}

    def promote(self, head: Head, expected_generation: int) -> None:
        """See PolicyRegistry."""
        with self._changed:
            problem = self._conflict(head, expected_generation)
            if problem:
                found = self._head.generation if self._head else 0
                raise PromoteConflictError(expected_generation, found, problem)
            self._head = head
            self._events.append(Event(head.generation, head.digest, time.time()))
            self._promotions += 1
            self._changed.notify_all()

    def _conflict(self, head: Head, expected: int) -> str:
        """Why the promotion must fail, in the order of the Lua script; "" if it may pass."""
        found = self._head.generation if self._head else 0
        if self._head is not None and self._head.epoch != head.epoch:
            return "another epoch"
        if found != expected:
            return "the head moved"
        if head.generation <= found:
            return "the generation is not above the head's"
        return "" if head.digest in self._blobs else "the blob is missing"

    def wait(self, timeout_s: float) -> bool:
        """See PolicyRegistry."""
        with self._changed:
            seen = getattr(self._seen, "promotions", 0)
            woken = self._changed.wait_for(lambda: self._promotions > seen, timeout_s)
            self._seen.promotions = self._promotions
        return woken

    def acknowledge(self, ack: Ack, ttl_s: float) -> None:
        """See PolicyRegistry."""
        with self._changed:
            self._acks[ack.worker] = (ack, time.monotonic() + ttl_s)

    def acks(self) -> list[Ack]:
        """See PolicyRegistry."""
        now = time.monotonic()
        with self._changed:
            living = [ack for ack, until in self._acks.values() if until > now]
        return sorted(living, key=lambda ack: ack.worker)

    def stamp(self, envelope: bytes, ttl_s: float) -> None:
        """See PolicyRegistry."""
        self._stamp = (envelope, time.monotonic() + ttl_s)

    def fresh(self) -> bytes | None:
        """See PolicyRegistry."""
        stamp = self._stamp
        return stamp[0] if stamp and stamp[1] > time.monotonic() else None

    def put_root(self, version: int, envelope: bytes) -> None:
        """See PolicyRegistry."""
        self._roots[version] = envelope

    def root(self, version: int) -> bytes | None:
        """See PolicyRegistry."""
        return self._roots.get(version)

    def events(self, count: int) -> list[Event]:
        """See PolicyRegistry."""
        with self._changed:
            return list(reversed(self._events))[:count]

    def close(self) -> None:
        """Nothing to let go of."""
