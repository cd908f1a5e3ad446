"""The publisher's truth: every release ever signed, in order, never rewritten.

``Ledger`` is what a publisher asks of a store; ``FolderLedger`` keeps one in files:
``00000001.release`` (the signed envelope), ``blobs/<sha256>``, ``promoted`` (the generations
served, in order, one a line) and ``lock``.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from offramp.controller.durable import lock_file, write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import digest_of


class Ledger(Protocol):
    """An append-only store of releases; one publisher at a time writes to it.

    Every method that reads may raise ConfigError: what it asks for is missing or damaged.
    """

    def append(
        self, generation: int, envelope: bytes, blob: bytes, others: Iterable[bytes] = ()
    ) -> None:
        """Record a release for good, its blobs first. An empty ledger may begin at any generation.

        Args:
            generation: Number of the release.
            envelope: Its signed manifest.
            blob: Weights of its policy.
            others: What it needs beside them, taken one at a time.

        Raises:
            ConfigError: the generation is there already, or would leave a gap.
        """
        ...

    def generations(self) -> list[int]:
        """Every generation recorded, ascending, without a gap."""
        ...

    def last(self) -> int:
        """The newest generation recorded; 0 if there is none."""
        ...

    def get(self, generation: int) -> bytes:
        """The signed envelope of a generation."""
        ...

    def blob(self, digest: str) -> bytes:
        """The blob of a digest, checked."""
        ...

    def promotions(self) -> list[int]:
        """Every generation promoted, in order."""
        ...

    def promoted(self) -> int:
        """The generation promoted last; 0 if there is none."""
        ...

    def record_promotion(self, generation: int) -> None:
        """Remember that a generation is served, so that an older head can be told apart."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """Keep every other writer out while a block runs; it may be entered again within itself."""
        ...

    def release_path(self, generation: int) -> Path:
        """Where whoever adds a signature finds the envelope of a generation."""
        ...


class FolderLedger:
    """A ledger of files that appear whole, in a folder that several processes may use.

    Args:
        folder: Made if missing.

    Raises:
        ConfigError: a generation between the first and the last is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn = threading.RLock()
        self._depth = 0
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.generations()

    def append(
        self, generation: int, envelope: bytes, blob: bytes, others: Iterable[bytes] = ()
    ) -> None:
        """Record a release for good. An empty ledger may begin at any generation.

        Args:
            generation: Number of the release.
            envelope: Its signed manifest.
            blob: Weights of its policy.
            others: What it needs beside them, taken one at a time.

        Raises:
            ConfigError: the generation is there already, or would leave a gap.
        """
        with self.writing():
            last = self.last()
            if generation <= last:
                raise _refused(f"generation {generation} is recorded already; nothing is rewritten")
            if last and generation != last + 1:
                raise _refused(f"generation {generation} would leave a gap after {last}")
            for each in itertools.chain([blob], others):
                path = self._blob_path(digest_of(each))
                if not path.exists() or path.read_bytes() != each:
                    write_durably(path, each)
            write_durably(self.release_path(generation), envelope)

    def generations(self) -> list[int]:
        """Every generation recorded, ascending.

        Raises:
            ConfigError: one between the first and the last is missing.
        """
        found = sorted(int(path.stem) for path in self._folder.glob("[0-9]*.release"))
        for before, after in pairwise(found):
            if after != before + 1:
                raise _refused(f"generation {before + 1} is missing")
        return found

    def last(self) -> int:
        """The newest generation recorded; 0 if there is none.

        Raises:
            ConfigError: a generation is missing.
        """
        generations = self.generations()
        return generations[-1] if generations else 0

    def get(self, generation: int) -> bytes:
        """The signed envelope of a generation.

        Raises:
            ConfigError: it is not recorded.
        """
        return _read(self.release_path(generation), f"generation {generation}")

    def blob(self, digest: str) -> bytes:
        """The blob of a digest.

        Raises:
            ConfigError: it is not recorded, or damaged.
        """
        blob = _read(self._blob_path(digest), f"blob {digest}")
        if digest_of(blob) != digest:
            raise _refused(f"blob {digest} is damaged")
        return blob

    def promotions(self) -> list[int]:
        """Every generation promoted, in order.

        Raises:
            ConfigError: the record is unreadable.
        """
        path = self._folder / "promoted"
        try:
            return [int(line) for line in path.read_text().split()] if path.exists() else []
        except (OSError, ValueError) as error:
            raise _refused(f"{path}: {error}") from error

    def promoted(self) -> int:
        """The generation promoted last; 0 if there is none.

        Raises:
            ConfigError: the record is unreadable.
        """
        return (self.promotions() or [0])[-1]

    def record_promotion(self, generation: int) -> None:
        """Remember that a generation is served, so that an older head can be told apart."""
        with self.writing():
            lines = [f"{each}\n" for each in (*self.promotions(), generation)]
            write_durably(self._folder / "promoted", "".join(lines).encode())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep every other writer out, of this process or another, while the block runs.

        It may be entered again within itself. Readers need no lock: files appear whole.
        """
        with self._turn, ExitStack() as held:
            if self._depth == 0:
                held.enter_context(lock_file(self._folder / "lock"))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def release_path(self, generation: int) -> Path:
        """Where the signed envelope of a generation lies."""
        return self._folder / f"{generation:08d}.release"

    def _blob_path(self, digest: str) -> Path:
        return self._folder / "blobs" / digest


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(f"{what} is not recorded ({error})") from error


def _refused(problem: str) -> ConfigError:
    return ConfigError("ledger", problem, "Use the ledger folder of this channel's publisher")
