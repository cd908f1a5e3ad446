"""Keeps the running policy in step with the registry, and never takes it away."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from offramp.controller.errors import OfframpError, PolicyRefusedError, RegistryUnavailableError
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import Ack, AckState, Head, PolicyRegistry
from offramp.controller.release.trust import Mark, ReleaseVerifier
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.keeper import PROBATION_S, Prepare, ReleaseKeeper
from offramp.worker.following.root_follower import RootFollower
from offramp.worker.following.telling import AckLog, AckTeller
from offramp.worker.following.worker_state import WorkerState

__all__ = ["FULL_DEPTH", "PolicyRefresher", "PolicySnapshot"]
POLL_S = 5.0
"""Seconds between polls when no event wakes the worker."""

WAIT_S = 0.5
"""Longest single wait for an event, which bounds how long ``stop`` takes."""

CANARY = "canary"
"""Folder, within a worker's own, of what it remembers of canaries."""

_logger = logging.getLogger(__name__)


class PolicyRefresher:
    """Follows one channel. ``current`` is what new requests are pinned to.

    A release for everybody and a canary are kept alike, each by a keeper of its own, so that what
    becomes of one leaves the other as it is.

    Construction is the cold start: it takes the last-known-good release from disk, checked as
    strictly as one from the registry, or else full depth.

    Args:
        registry: Where the head is looked up; its answers are never trusted.
        verifier: Decides whether a release is meant for this worker.
        state_dir: The worker's own folder.
        worker_id: Name in acknowledgements.
        poll_s: Seconds between polls when no event wakes it; each is jittered by ±20 %.
        prepare: Told each policy, in this refresher's thread, before requests are pinned to it.
        probation_s: Seconds that a release must run here before it is the last known good one.
        fetcher: Fetches what releases need; by default for an engine that can be given no adapters.

    Attributes:
        report: The latest acknowledgement, also when the registry could not be told.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        verifier: ReleaseVerifier,
        state_dir: Path,
        worker_id: str,
        poll_s: float = POLL_S,
        prepare: Prepare = lambda *_: None,
        probation_s: float = PROBATION_S,
        fetcher: ReleaseFetcher | None = None,
    ) -> None:
        self._registry = registry
        self._verifier = verifier
        self._worker_id = worker_id
        self._poll_s = poll_s
        self._boot = uuid.uuid4().hex
        self._about = 0  # the release on offer that is looked at
        self._refused: tuple[Manifest, PolicyRefusedError] | None = None
        self._log = AckLog()
        self._polling = threading.Lock()
        self._stopping = threading.Event()
        self._woken = threading.Event()  # by a trip, which the registry should hear of at once
        self._thread: threading.Thread | None = None
        state = WorkerState(state_dir)
        self._roots = RootFollower(registry, verifier, state_dir)
        self._fetcher = fetcher or ReleaseFetcher(registry, state_dir)
        self._stable, self._canary = (
            ReleaseKeeper(
                verifier, each, self._fetcher.adapters, prepare, probation_s, self._woken.set
            )
            for each in (state, WorkerState(state_dir, CANARY))
        )
        self._teller = AckTeller(registry, poll_s)
        self._fresh_at_s = time.monotonic()
        self._canary.cold_start()
        if self._canary.is_on_trial:
            state.forgive()  # if starts end in a crash, the newer release is put away first
        self.report = self._ack(AckState.STALE, self._stable.cold_start())

    @property
    def current(self) -> PolicySnapshot:
        """The release for everybody, and with it the canary that was signed to run beside it."""
        stable, canary = self._stable.current, self._canary.current
        is_beside = canary.rollout.stable_generation == stable.generation > 0
        return replace(stable, canary=canary) if is_beside else stable

    @property
    def unreported(self) -> str:
        """Why the registry could not be told of the latest acknowledgement; "" if it was.

        To follow a channel it suffices to read it: a worker may be up to date all the same.
        """
        return self._teller.unreported

    @property
    def stale_s(self) -> float:
        """Seconds for which it has not known which release is the newest; 0 if it knows."""
        if self.report.state is not AckState.STALE:
            return 0.0
        return time.monotonic() - self._fresh_at_s

    @property
    def trips(self) -> int:
        """Releases taken out of service since its start."""
        return self._stable.trips + self._canary.trips

    def trip(self, generation: int, reason: str) -> None:
        """Take a release out of service; see ReleaseKeeper."""
        self._stable.trip(generation, reason)
        self._canary.trip(generation, reason)

    @property
    def _mark(self) -> Mark | None:
        marks = (self._stable.mark, self._canary.mark)
        return max((mark for mark in marks if mark is not None), default=None)

    def poll_once(self) -> Ack:
        """Read the head once, act on it, and acknowledge. Never raises for a bad or absent head."""
        with self._polling:
            self.report = ack = self._ack(*self._refresh())
            self._log.note(ack, self.current.canary)
            if ack.state is not AckState.STALE:
                self._fresh_at_s = time.monotonic()
            self._teller.tell(ack)
            return ack

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
        self._stable.forgive()
        self._canary.forgive()

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
            if self._woken.is_set():
                self._woken.clear()
                return
            try:
                if self._registry.wait(min(left_s, WAIT_S)):
                    return
            except OfframpError:
                self._stopping.wait(left_s)

    def _refresh(self) -> tuple[AckState, str]:
        try:
            self._stable.keep_state()
            self._canary.keep_state()
            stale = self._roots.follow()
            if self._roots.lost:
                return AckState.STALE, self._roots.lost
            head = self._registry.head()
            if head is None:
                return self._without_head()
            stale = stale or self._staleness(head)
            manifest = self._verifier.verify(head, self._mark)
            unknown = self._cannot_judge(manifest)
            if unknown and stale:
                return AckState.STALE, f"{unknown}, and {stale}"
            self._about = manifest.generation
            if harm := self._follow(head, manifest):
                return AckState.TRIPPED, harm
        except PolicyRefusedError as error:
            return AckState.NACK, f"{error.reason.value}: {error.detail}"
        except RegistryUnavailableError as error:
            return AckState.STALE, str(error)
        except OSError as error:
            return AckState.STALE, f"the state folder cannot be written: {error}"
        return (AckState.STALE, stale) if stale else (AckState.ACK, "")

    def _without_head(self) -> tuple[AckState, str]:
        if self._mark is None and not self._is_mark_lost:
            return AckState.ACK, "nothing was promoted yet"
        return AckState.STALE, "the registry lost its head"

    def _staleness(self, head: Head) -> str:
        try:
            return self._verifier.staleness(self._registry.fresh(), head)
        except PolicyRefusedError as error:
            return f"the publisher's timestamp cannot be read: {error}"

    def _cannot_judge(self, manifest: Manifest) -> str:
        """Why an old head would look like any other, so that only the publisher can tell."""
        mark = self._mark
        if self._is_mark_lost:
            return "the mark was lost"
        if mark is None:
            return "no release was accepted before"
        return f"epoch {manifest.epoch} would be new" if manifest.epoch > mark.epoch else ""

    @property
    def _is_mark_lost(self) -> bool:
        return self._stable.mark_lost or self._canary.mark_lost

    def _follow(self, head: Head, manifest: Manifest) -> str:
        """Take what a verified head offers; returns what harm it did here, "" if none.

        Raises:
            PolicyRefusedError, OSError: see ``_consider``.
        """
        if not manifest.rollout.is_canary:
            harm = self._consider(self._stable, manifest, head.envelope)
            self._canary.end(Mark.of(manifest))
            return harm
        stable = self._verifier.verify_stable(head, manifest, self._stable.mark)
        if harm := self._consider(self._stable, stable, head.stable):
            self._about = stable.generation
            return harm
        is_new = self._canary.loaded != manifest
        harm = self._consider(self._canary, manifest, head.envelope)
        if is_new and not harm and (watch := self._stable.current.watch):
            watch.count_anew()  # both tracks are compared over the same time
        return harm

    def _consider(self, keeper: ReleaseKeeper, manifest: Manifest, envelope: bytes) -> str:
        """Take a verified release if it is new and right; returns what harm it did here before.

        What a clock or the registry's repair can heal is looked at anew each time; signed bytes
        that are no policy for this worker stay so.

        Raises:
            PolicyRefusedError: it is not right; the running policy is untouched.
            OSError: it could not be recorded, so it was not taken.
        """
        if harm := keeper.harm_of(manifest):
            return harm
        if keeper.loaded == manifest:
            return ""
        if self._refused is not None and self._refused[0] == manifest:
            raise PolicyRefusedError(self._refused[1].reason, self._refused[1].detail)
        busy = f"taking in generation {manifest.generation}; its kernels may have to be compiled"
        with self._teller.meanwhile(partial(self._ack, AckState.PREPARING, busy)):
            blob = self._fetcher.fetch(manifest)
            try:
                keeper.accept(manifest, envelope, blob)
            except PolicyRefusedError as error:
                self._refused = (manifest, error)
                raise
        self._fetcher.forget_others(self._stable.adapters_kept | self._canary.adapters_kept)
        return ""

    def _ack(self, state: AckState, reason: str) -> Ack:
        running = self._stable.current
        return Ack(
            worker=self._worker_id,
            boot=self._boot,
            generation=running.generation,
            digest=running.digest,
            about=self._about if state is AckState.TRIPPED else running.generation,
            state=state,
            reason=reason,
            at=time.time(),
            tallies=tuple(each.tally.copy() for each in self.watches()),
        )

    def watches(self) -> Iterator[PolicyWatch]:
        """Those of the releases that run: the one for everybody, and its canary."""
        current = self.current
        for snapshot in (current, current.canary):
            if snapshot is not None and snapshot.watch is not None:
                yield snapshot.watch
