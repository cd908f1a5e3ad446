"""A worker's memory across restarts: one folder that no other living process uses."""

from __future__ import annotations

import itertools
import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from offramp.controller.durable import lock_file, write_durably
from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.policies.kinds import digest_of
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.trust import Mark
from offramp.controller.strict import (
    COUNT,
    DIGEST,
    NUMBER,
    TEXT,
    Check,
    canonical_json,
    is_digest,
    or_null,
    parse_strictly,
)

CRASHES = 2
"""Starts that may end in a crash while a release is on probation before it is quarantined."""

_QUARANTINE_FIELDS: dict[str, Check] = {
    "generation": COUNT,
    "digest": DIGEST,
    "adapters": or_null((lambda value: value == "" or is_digest(value), f"{DIGEST[1]} or empty")),
    "reason": TEXT,
}
_SETTING_FIELDS: dict[str, Check] = {"generation": COUNT, "digest": DIGEST, "setting": NUMBER}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A release that did harm here, and is not run again by this worker.

    Attributes:
        generation: Its number; 0: its policy, through its adapters, is not run under any number.
        digest: SHA-256 of its blob, hex.
        adapters: SHA-256 of the adapters that it names, hex, or ""; None: whatever they are, as
            workers wrote it that did not note them.
        reason: What it did, in a sentence.
    """

    generation: int
    digest: str
    adapters: str | None = None
    reason: str

    def holds(self, offered: Manifest) -> bool:
        """Whether a release on offer is the one."""
        is_same = self.digest == offered.digest and self.adapters in (None, offered.adapters)
        return is_same and self.generation in (0, offered.generation)


class WorkerState:
    """The mark, the releases on probation and last known good, their setting, and the quarantine.

    A release that is accepted is on trial until it has run for a while; then it takes the place of
    the last known good one. A start counts as a crash until the worker says otherwise.

    Args:
        worker: The worker's own folder; made if missing.
        track: Folder within it: "" for the release that serves everybody, another for canaries.
    """

    def __init__(self, worker: Path, track: str = "") -> None:
        self._worker, self._track = worker, track
        folder = worker / track
        self._mark = folder / "mark"
        self._good = folder / "last-known-good"
        self._trial = folder / "trial"
        self._starts = folder / "starts"
        self._quarantine = folder / "quarantine"
        self._setting = folder / "setting"

    def mark(self) -> Mark | None:
        """The highest release accepted; None if this worker never accepted one.

        Raises:
            ConfigError: the record is damaged, or missing beside an accepted release.
        """
        if not self._mark.exists():
            if self._good.exists() or self._trial.exists():
                raise _lost("the mark is missing beside an accepted release")
            return None
        try:
            return Mark.from_bytes(_read_record(self._mark))
        except (OSError, PolicyRefusedError) as error:
            raise _lost(f"the mark is unreadable: {error}") from error

    def pool_mark(self) -> Mark | None:
        """The highest mark in the pool: a new worker need not believe what its neighbours do not.

        None if no neighbour has a readable one.
        """
        found = []
        for worker in self._worker.parent.iterdir() if self._worker.parent.exists() else ():
            try:
                found.append(WorkerState(worker, self._track).mark())
            except ConfigError:  # the neighbour will say so itself
                continue
        return max((mark for mark in found if mark is not None), default=None)

    def trial(self) -> tuple[bytes, bytes] | None:
        """Envelope and blob of the release on probation, both unchecked; None if there is none.

        Raises:
            ConfigError: the file cannot be read.
        """
        return _read_release(self._trial)

    def last_good(self) -> tuple[bytes, bytes] | None:
        """Envelope and blob of the last release that passed probation. Read as ``trial`` is."""
        return _read_release(self._good)

    def save(self, mark: Mark, envelope: bytes, blob: bytes) -> None:
        """Record an accepted release, on probation.

        Raises:
            OSError: the folder cannot be written.
        """
        self.forgive()
        # The release first: after a crash in between, it is simply newer than the mark.
        write_durably(self._trial, len(envelope).to_bytes(4, "big") + envelope + blob)
        self.raise_mark(mark)

    def raise_mark(self, mark: Mark) -> None:
        """Record the highest release accepted.

        Raises:
            OSError: the folder cannot be written.
        """
        _write_record(self._mark, mark.to_bytes())

    def count_start(self) -> bool:
        """Count a start under the release on trial; False if too many have ended in a crash.

        Raises:
            OSError: the folder cannot be written.
        """
        starts = len(self._starts.read_bytes()) if self._starts.exists() else 0
        if starts >= CRASHES:
            return False
        write_durably(self._starts, b"." * (starts + 1))
        return True

    def forgive(self) -> None:
        """The worker lives, or ends in order: the starts counted so far were no crashes."""
        self._starts.unlink(missing_ok=True)

    def settle(self) -> None:
        """The release on trial has proved itself: it is the last known good one.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._trial.exists():
            write_durably(self._good, self._trial.read_bytes())
            self._trial.unlink()
        self.forgive()

    def quarantined(self) -> Quarantine | None:
        """What must not run again; None if there is nothing, or nobody can tell any more."""
        if not self._quarantine.exists():
            return None
        try:
            raw = _read_record(self._quarantine)
            return Quarantine(**parse_strictly(raw, _QUARANTINE_FIELDS, optional=["adapters"]))
        except (OSError, PolicyRefusedError, ConfigError):
            return None

    def quarantine(self, record: Quarantine) -> None:
        """Never run a release again.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {name: getattr(record, name) for name in _QUARANTINE_FIELDS}
        _write_record(self._quarantine, canonical_json(values))

    def setting_of(self, release: Manifest) -> float | None:
        """The certified setting that a release was moved to; None: to none, or nobody can tell."""
        try:
            values = parse_strictly(_read_record(self._setting), _SETTING_FIELDS)
        except (OSError, PolicyRefusedError, ConfigError):
            return None
        is_same = (values["generation"], values["digest"]) == (release.generation, release.digest)
        return float(values["setting"]) if is_same else None

    def keep_setting(self, generation: int, digest: str, setting: float) -> None:
        """Record the certified setting that a release was moved to.

        Raises:
            OSError: the folder cannot be written.
        """
        values = {"generation": generation, "digest": digest, "setting": setting}
        _write_record(self._setting, canonical_json(values))

    def end_trial(self) -> None:
        """Forget the release on trial."""
        self._trial.unlink(missing_ok=True)
        self.forgive()

    def end_track(self) -> None:
        """Forget every release but the mark: this track serves nobody any more."""
        self.end_trial()
        self._good.unlink(missing_ok=True)
        self._setting.unlink(missing_ok=True)


def _read_record(path: Path) -> bytes:
    checksum, _, record = path.read_bytes().partition(b"\n")
    if checksum != digest_of(record).encode():
        raise _lost(f"{path.name} is damaged")
    return record


def _write_record(path: Path, record: bytes) -> None:
    write_durably(path, digest_of(record).encode() + b"\n" + record)


def _read_release(path: Path) -> tuple[bytes, bytes] | None:
    if not path.exists():
        return None
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _lost(f"{path.name} is unreadable: {error}") from error
    end = 4 + int.from_bytes(raw[:4], "big")
    return raw[4:end], raw[end:]


def _lost(problem: str) -> ConfigError:
    return ConfigError("state_dir", problem, "Wait for a release that the publisher vouches for")


class StateClaim:
    """The first folder of a pool that no living worker uses, and the worker's name.

    The name holds a random part that is drawn once per folder, so that workers of two pools on one
    channel never share one, and a worker keeps its name, and its mark, over restarts.

    Args:
        pool: Folder of the pool's workers; made if missing.

    Attributes:
        folder: The worker's own folder, until ``release`` or the end of the process.
        name: What the worker calls itself in acknowledgements.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, pool: Path) -> None:
        self._held = ExitStack()
        try:
            folders = (pool / f"worker-{number}" for number in itertools.count())
            self.folder = next(folder for folder in folders if self._is_mine(folder))
            self.name = f"{self.folder.name}-{_identity(self.folder / 'identity')}"
        except OSError as error:
            remedy = "Name a folder that the workers may write to"
            raise ConfigError("state_dir", str(error), remedy) from error

    def release(self) -> None:
        """Let another worker have the folder."""
        self._held.close()

    def _is_mine(self, folder: Path) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        return self._held.enter_context(lock_file(folder / "lock", wait=False))


def _identity(path: Path) -> str:
    if not path.exists():
        write_durably(path, secrets.token_hex(6).encode())
    return path.read_text()
