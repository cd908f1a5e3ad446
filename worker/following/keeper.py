"""Holds the release that a worker runs, and remembers it on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.weights import require_quick
from offramp.controller.release.certified_points import certified_range
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.trust import Mark, ReleaseVerifier
from offramp.controller.watching.adaptation import SettingWalk
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.request import FULL_DEPTH, ExitReaders, PolicySnapshot
from offramp.worker.following.worker_state import CRASHES, Quarantine, WorkerState

PROBATION_S = 60.0
"""How long a release must run before a worker counts on it at its next start."""

SELF_TEST_S = 0.05
"""Longest that a policy may take for its canned inputs, before requests are pinned to it."""


Prepare = Callable[[Policy, Any], None]
"""Told a policy and what its exits are read through, of the kind that the worker's fetcher brings;
None: the worker's own."""


class ReleaseKeeper:
    """Swaps the running policy, and takes it out of service if it does harm.

    Used by the refresher's thread, but for ``trip``, which any thread may call, and ``current``,
    which any thread may read.

    Args:
        verifier: Decides whether a release is meant for this worker.
        state: The worker's memory on disk.
        adapters_of: Gives what a release's exits are read through; None: the engine's own adapters.
        prepare: Told each policy before requests are pinned to it.
        probation_s: Seconds that a release must run here before it is the last known good one.
        tell: Called after a trip, by the thread that tripped.

    Attributes:
        current: The running policy: one reference, replaced as a whole.
        mark: The highest release accepted; None if none was, or it was lost.
        mark_lost: Whether a mark was there that cannot be read.
        loaded: The release that was activated last; None before the first.
        trips: How often a release was taken out of service.
    """

    def __init__(
        self,
        verifier: ReleaseVerifier,
        state: WorkerState,
        adapters_of: Callable[[Manifest], ExitReaders | None],
        prepare: Prepare,
        probation_s: float,
        tell: Callable[[], None],
    ) -> None:
        self.current: PolicySnapshot = FULL_DEPTH
        self.mark: Mark | None = None
        self.mark_lost = False
        self.loaded: Manifest | None = None
        self.trips = 0
        self._verifier = verifier
        self._state = state
        self._adapters_of = adapters_of
        self._prepare = prepare
        self._probation_s = probation_s
        self._tell = tell
        self._on_trial_until: float | None = None
        self._quarantine: Quarantine | None = state.quarantined()
        self._tripped: Quarantine | None = None  # not yet on disk
        self._setting_kept: float | None = None  # of the running release
        self._swapping = threading.Lock()  # never held during I/O: a trip must not wait

    def trip(self, generation: int, reason: str) -> None:
        """Send every new request to full depth at once, until another release comes or a restart.

        Args:
            generation: The release that did harm; nothing happens if another runs by now.
            reason: Names the guardrail that was hit, and what hit it.
        """
        with self._swapping:
            if self.current.generation != generation:
                return
            self._tripped = Quarantine(
                generation=generation,
                digest=self.current.digest,
                reason=f"generation {generation}: {reason}",
            )
            self.current = FULL_DEPTH
            self.trips += 1
        self._tell()

    def cold_start(self) -> str:
        """Load what was accepted before; returns what there is to say about it."""
        try:
            self.mark = self._state.mark() or self._state.pool_mark()
        except ConfigError as error:
            self.mark_lost = True
            return f"cold start at full depth: {error}"
        problems = []
        for load in (self._load_trial, self._load_good):
            try:
                if load():
                    return f"cold start with generation {self.current.generation}"
            except (ConfigError, PolicyRefusedError, OSError) as error:
                problems.append(str(error))
        why = "; ".join(problems) or "no release was accepted before"
        return f"cold start at full depth: {why}"

    def _load_trial(self) -> bool:
        stored = self._state.trial()
        if stored is None:
            return False
        manifest = self._verifier.verify_stored(stored[0], self.mark)
        if not self._state.count_start():
            reason = f"{CRASHES} starts under generation {manifest.generation} ended in a crash"
            digest, adapters = manifest.served
            self._put_away(
                Quarantine(generation=0, digest=digest, adapters=adapters, reason=reason)
            )
            return False
        self._activate(
            manifest, self._checked(manifest, stored[1]), self._state.setting_of(manifest)
        )
        self._raise_mark(Mark.of(manifest))
        return True

    def _load_good(self) -> bool:
        stored = self._state.last_good()
        if stored is None:
            return False
        # Below the mark is right here: what came after it was put away, or is damaged.
        manifest = self._verifier.verify_stored(stored[0], None)
        if self._quarantine is not None and self._quarantine.holds(manifest):
            return False
        self._activate(
            manifest, self._checked(manifest, stored[1]), self._state.setting_of(manifest)
        )
        self._on_trial_until = None
        return True

    def keep_state(self) -> None:
        """Bring to disk what happened since: a trip, a move, or a probation that was passed.

        Raises:
            OSError: the folder cannot be written; a move is tried again the next time.
        """
        with self._swapping:
            tripped, self._tripped = self._tripped, None
        if tripped is not None:
            self._put_away(tripped)
        now = self.current
        if now.setting is not None and now.setting != self._setting_kept:
            self._state.keep_setting(now.generation, now.digest, now.setting)
            self._setting_kept = now.setting
        if self._on_trial_until is not None and time.monotonic() >= self._on_trial_until:
            self._on_trial_until = None
            self._state.settle()

    def _put_away(self, record: Quarantine) -> None:
        self._quarantine = record  # even if the disk is full
        self._state.quarantine(record)
        if self.loaded is None or record.holds(self.loaded):  # and no newer one took its place
            self._on_trial_until = None
            self._state.end_trial()

    def accept(self, manifest: Manifest, envelope: bytes, blob: bytes) -> None:
        """Try a verified release out, record it, and let new requests run under it.

        Raises:
            PolicyRefusedError: it is no policy for this worker.
            OSError: it could not be recorded, so it was not taken.
        """
        checked = self._checked(manifest, blob)
        self._state.save(Mark.of(manifest), envelope, blob)
        self.mark, self.mark_lost = Mark.of(manifest), False
        self._activate(manifest, checked)

    def _checked(self, manifest: Manifest, blob: bytes) -> tuple[Policy, ExitReaders | None]:
        """The policy of a verified release, tried out, and what its exits are read through."""
        policy = self._verifier.open(manifest, blob)
        require_quick(policy, blob, SELF_TEST_S)
        adapters = self._adapters_of(manifest)
        try:
            self._prepare(policy, adapters)
        except Exception as error:  # what fails here would fail in the middle of decoding
            detail = f"it cannot be prepared: {error}"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail) from error
        return policy, adapters

    @property
    def adapters_kept(self) -> set[str]:
        """Digests of the adapters that the releases on disk name; "" for one that names none."""
        found = {self.current.adapters.digest} if self.current.adapters else set()
        for read in (self._state.trial, self._state.last_good):
            try:
                if stored := read():
                    found.add(self._verifier.read(stored[0]).adapters)
            except (ConfigError, PolicyRefusedError):  # damaged: it will not be loaded either
                continue
        return found

    def _raise_mark(self, mark: Mark) -> None:
        if self.mark is None or mark > self.mark:
            self._state.raise_mark(mark)
            self.mark = mark

    def _activate(
        self,
        manifest: Manifest,
        checked: tuple[Policy, ExitReaders | None],
        moved_to: float | None = None,
    ) -> None:
        """Let new requests run under a release, at the setting that a run before had moved to."""
        policy, adapters = checked
        generation = manifest.generation
        policies, above = certified_range(policy, manifest.certificate), manifest.bounds.adapt_above
        setting = [*policies][-1] if policies else None  # as it was published
        walk = None
        if policies and above is not None:
            setting = moved_to if moved_to in policies else setting
            walk = SettingWalk([*policies], above, setting)
        watch = PolicyWatch(
            manifest.bounds,
            partial(self.trip, generation),
            generation,
            walk,
            partial(self._move, generation, policies),
        )
        self.loaded = manifest
        self._on_trial_until = time.monotonic() + self._probation_s
        self._setting_kept = setting  # a release that stays where it began needs no record
        with self._swapping:
            self.current = PolicySnapshot(
                manifest.generation,
                manifest.digest,
                policy if setting is None else policies[setting],
                manifest.certificate,
                watch,
                manifest.rollout,
                adapters=adapters,
                setting=setting,
            )

    def _move(self, generation: int, policies: Mapping[float, Policy], setting: float) -> None:
        """Let new requests run at another certified setting; those under way keep theirs."""
        with self._swapping:
            if self.current.generation != generation:
                return
            self.current = replace(self.current, policy=policies[setting], setting=setting)
        self._tell()

    @property
    def is_on_trial(self) -> bool:
        """Whether the running release has yet to prove itself."""
        return self._on_trial_until is not None

    def end(self, by: Mark) -> None:
        """Run no release any more, and remember none but the one that ended this.

        Raises:
            OSError: the folder cannot be written.
        """
        if self.loaded is None and not self.mark_lost:
            return
        with self._swapping:
            self.current = FULL_DEPTH
        self._raise_mark(by)
        self.loaded, self.mark_lost, self._on_trial_until = None, False, None
        self._state.end_track()

    def harm_of(self, offered: Manifest) -> str:
        """What a release on offer did here, if it is in quarantine; "" if it is not.

        Raises:
            OSError: the mark, which it raises all the same, cannot be written.
        """
        if self._quarantine is None or not self._quarantine.holds(offered):
            return ""
        self._raise_mark(Mark.of(offered))
        return self._quarantine.reason

    def forgive(self) -> None:
        """The worker ends in order."""
        self._state.forgive()
