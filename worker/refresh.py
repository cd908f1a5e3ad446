"""Keeps the running policy in step with the registry, and never takes it away."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from offramp.controller.durable import write_durably
from offramp.controller.errors import (
    ConfigError,
    PolicyRefusedError,
    Refusal,
    RegistryUnavailableError,
)
from offramp.controller.policies.kinds import MAX_BLOB_BYTES, digest_of
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import Ack, AckState, Head, PolicyRegistry
from offramp.controller.release.trust import Mark, ReleaseVerifier
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot

__all__ = ["FULL_DEPTH", "PolicyRefresher", "PolicySnapshot"]

POLL_S = 5.0
"""Seconds between polls when no event wakes the worker."""

ACK_TTL_POLLS = 6
"""Polls after which the acknowledgement of a silent worker is forgotten."""

WAIT_S = 0.5
"""Longest single wait for an event, which bounds how long ``stop`` takes."""

_logger = logging.getLogger(__name__)


class WorkerState:
    """The worker's memory across restarts: the mark, and the last release that it accepted.

    Args:
        folder: Made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._mark = folder / "mark"
        self._good = folder / "last-known-good"

    def mark(self) -> Mark | None:
        """The highest release accepted; None if this worker never accepted one.

        Raises:
            ConfigError: the record is damaged, or missing beside an accepted release.
        """
        if not self._mark.exists():
            if self._good.exists():
                raise _lost("the mark is missing beside an accepted release")
            return None
        try:
            checksum, _, record = self._mark.read_bytes().partition(b"\n")
            if checksum != digest_of(record).encode():
                raise _lost("the mark is damaged")
            return Mark.from_bytes(record)
        except (OSError, PolicyRefusedError) as error:
            raise _lost(f"the mark is unreadable: {error}") from error

    def last_good(self) -> tuple[bytes, bytes] | None:
        """Envelope and blob of the release accepted last, both unchecked; None if there is none.

        Raises:
            ConfigError: the file cannot be read.
        """
        if not self._good.exists():
            return None
        try:
            raw = self._good.read_bytes()
        except OSError as error:
            raise _lost(f"the last-known-good release is unreadable: {error}") from error
        end = 4 + int.from_bytes(raw[:4], "big")
        return raw[4:end], raw[end:]

    def save(self, mark: Mark, envelope: bytes, blob: bytes) -> None:
        """Record an accepted release.

        Raises:
            OSError: the folder cannot be written.
        """
        # The release first: after a crash in between, it is simply newer than the mark.
        write_durably(self._good, len(envelope).to_bytes(4, "big") + envelope + blob)
        record = mark.to_bytes()
        write_durably(self._mark, digest_of(record).encode() + b"\n" + record)


def _lost(problem: str) -> ConfigError:
    return ConfigError("state_dir", problem, "Wait for a release that the publisher vouches for")


class PolicyRefresher:
    """Follows one channel. ``current`` is what new requests are pinned to.

    Construction is the cold start: it takes the last-known-good release from disk, checked as
    strictly as one from the registry, or else full depth.

    Args:
        registry: Where the head is looked up; its answers are never trusted.
        verifier: Decides whether a release is meant for this worker.
        state_dir: The worker's own folder.
        worker_id: Name in acknowledgements.
        poll_s: Seconds between polls when no event wakes it; each is jittered by ±20 %.
        prepare: Told each policy, in this refresher's thread, before requests are pinned to it.

    Attributes:
        current: The running policy: one reference, replaced as a whole.
        report: The latest acknowledgement, also when the registry could not be told.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        verifier: ReleaseVerifier,
        state_dir: Path,
        worker_id: str,
        poll_s: float = POLL_S,
        prepare: Callable[[Policy], None] = lambda _: None,
    ) -> None:
        self.current: PolicySnapshot = FULL_DEPTH
        self._registry = registry
        self._verifier = verifier
        self._state = WorkerState(state_dir)
        self._worker_id = worker_id
        self._poll_s = poll_s
        self._prepare = prepare
        self._boot = uuid.uuid4().hex
        self._mark: Mark | None = None
        self._mark_lost = False
        self._loaded: Mark | None = None
        self._refused: tuple[Head, PolicyRefusedError] | None = None
        self._tripped = ""
        self._polling = threading.Lock()
        self._swapping = threading.Lock()  # never held during I/O: a trip must not wait
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.report = self._ack(AckState.STALE, self._cold_start())

    def poll_once(self) -> Ack:
        """Read the head once, act on it, and acknowledge. Never raises for a bad or absent head."""
        with self._polling:
            try:
                ack = self._ack(*self._refresh())
                self._registry.acknowledge(ack, ACK_TTL_POLLS * self._poll_s)
            except RegistryUnavailableError as error:
                ack = self._ack(AckState.STALE, str(error))
            self.report = ack
            return ack

    def trip(self, reason: str) -> None:
        """Send every new request to full depth at once, until another release comes or a restart.

        Args:
            reason: Names the guardrail that was hit, and what hit it.
        """
        with self._swapping:
            self._tripped = self._tripped or f"generation {self.current.generation}: {reason}"
            self.current = FULL_DEPTH

    def start(self) -> None:
        """Poll in a thread, woken by the registry's events."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="policy-refresh", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; the running policy stays."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.poll_once()
            except Exception:  # a dead thread would freeze the policy without a word
                _logger.exception("policy refresh failed; the running policy stays")
            self._wait(self._poll_s * random.uniform(0.8, 1.2))

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._stopping.is_set() and (left_s := deadline - time.monotonic()) > 0:
            try:
                if self._registry.wait(min(left_s, WAIT_S)):
                    return
            except RegistryUnavailableError:
                self._stopping.wait(left_s)

    def _cold_start(self) -> str:
        """Load what was accepted before; returns what there is to say about it."""
        try:
            self._mark = self._state.mark()
        except ConfigError as error:
            self._mark_lost = True
            return f"cold start at full depth: {error}"
        try:
            good = self._state.last_good()
            if good is None:
                return "cold start at full depth: no release was accepted before"
            envelope, blob = good
            manifest = self._verifier.verify_stored(envelope, self._mark)
            self._accept(manifest, envelope, blob)
        except (ConfigError, PolicyRefusedError, OSError) as error:
            return f"cold start at full depth: {error}"
        return f"cold start with generation {manifest.generation}"

    def _refresh(self) -> tuple[AckState, str]:
        try:
            head = self._registry.head()
            if head is None:
                return self._without_head()
            stale = self._verifier.staleness(self._registry.fresh(), head.generation)
            if self._mark_lost and stale:
                # Without a mark, an old head looks like any other: only the publisher can tell.
                return AckState.STALE, f"the mark was lost, and {stale}"
            self._consider(head)
        except PolicyRefusedError as error:
            return AckState.NACK, f"{error.reason.value}: {error.detail}"
        except OSError as error:
            return AckState.STALE, f"the state folder cannot be written: {error}"
        if self._tripped:
            return AckState.TRIPPED, self._tripped
        return (AckState.STALE, stale) if stale else (AckState.ACK, "")

    def _without_head(self) -> tuple[AckState, str]:
        if self._mark is None and not self._mark_lost:
            return AckState.ACK, "nothing was promoted yet"
        return AckState.STALE, "the registry lost its head"

    def _consider(self, head: Head) -> None:
        """Take the head if it is new and right.

        Raises:
            PolicyRefusedError: it is not right; the running policy is untouched.
            OSError: it could not be recorded, so it was not taken.
        """
        if self._refused is not None and self._refused[0] == head:
            raise PolicyRefusedError(self._refused[1].reason, self._refused[1].detail)
        try:
            manifest = self._verifier.verify(head, self._mark)
            if self._loaded != Mark(manifest.generation, manifest.digest):
                self._accept(manifest, head.envelope, self._fetch(manifest))
        except PolicyRefusedError as error:
            # A missing blob may yet arrive; every other refusal is for good.
            if error.reason is not Refusal.MISSING_BLOB:
                self._refused = (head, error)
            raise

    def _fetch(self, manifest: Manifest) -> bytes:
        blob = self._registry.get_blob(manifest.digest, min(manifest.size, MAX_BLOB_BYTES))
        if blob is None:
            raise PolicyRefusedError(Refusal.MISSING_BLOB, f"no blob {manifest.digest}")
        return blob

    def _accept(self, manifest: Manifest, envelope: bytes, blob: bytes) -> None:
        policy = self._verifier.open(manifest, blob)
        try:
            self._prepare(policy)
        except Exception as error:  # what fails here would fail in the middle of decoding
            detail = f"its probe cannot be prepared: {error}"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail) from error
        mark = Mark(manifest.generation, manifest.digest)
        self._state.save(mark, envelope, blob)
        self._mark = self._loaded = mark
        self._mark_lost = False
        with self._swapping:
            self._tripped = ""
            self.current = PolicySnapshot(
                manifest.generation, manifest.digest, policy, manifest.certificate
            )

    def _ack(self, state: AckState, reason: str) -> Ack:
        return Ack(
            worker=self._worker_id,
            boot=self._boot,
            generation=self.current.generation,
            digest=self.current.digest,
            state=state,
            reason=reason,
            at=time.time(),
        )
