"""A worker's memory across restarts: one folder that no other living process uses."""

from __future__ import annotations

import itertools
import secrets
from contextlib import ExitStack
from pathlib import Path

from offramp.controller.durable import lock_file, write_durably
from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.policies.kinds import digest_of
from offramp.controller.release.trust import Mark


class WorkerState:
    """The mark, and the last release that was accepted.

    Args:
        folder: The worker's own; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
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

    def pool_mark(self) -> Mark | None:
        """The highest mark in the pool: a new worker need not believe what its neighbours do not.

        None if no neighbour has a readable one.
        """
        found = []
        for path in self._folder.parent.glob("*/mark"):
            try:
                found.append(WorkerState(path.parent).mark())
            except ConfigError:  # the neighbour will say so itself
                continue
        return max((mark for mark in found if mark is not None), default=None)

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
