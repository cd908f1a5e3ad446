"""Remembers on disk how the root went on from the one that was given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from offramp.controller.durable import write_durably
from offramp.controller.errors import PolicyRefusedError
from offramp.controller.keys.root import Root


class RootChain:
    """The versions of a root from the given one to the newest, each checked against the last.

    Layout: ``<digest of the given root>/00000002.root``, so that another given root begins anew.

    Args:
        given: The root that somebody was handed.
        folder: Where those that follow it are kept; made when the first one comes.
        others: Such folders of others, read where a file is missing here or damaged.

    Attributes:
        newest: The root that is in force.
    """

    def __init__(self, given: Root, folder: Path, others: Iterable[Path] = ()) -> None:
        name = given.digest[:16]
        self._first = given.version + 1
        self._folder = folder / name
        self._last_seen = max((int(path.stem) for path in self._folder.glob("*.root")), default=0)
        self.newest = given
        folders = [self._folder, *(other / name for other in others)]
        while self._take_from(folders):
            pass

    @property
    def is_whole(self) -> bool:
        """Whether the newest root that was ever kept here is in force; no older one may be."""
        return self.newest.version >= self._last_seen

    def add(self, raw: bytes) -> None:
        """Take the next version.

        Raises:
            PolicyRefusedError: it does not follow the newest one; see ``Root.follow``.
            OSError: it cannot be kept, so it was not taken.
        """
        following = self.newest.follow(raw)
        write_durably(self._path(self._folder, following.version), raw)
        self.newest = following

    def envelopes(self) -> Iterator[tuple[int, bytes]]:
        """Each version after the given one, signed, with its number."""
        for version in range(self._first, self.newest.version + 1):
            yield version, self._path(self._folder, version).read_bytes()

    def _take_from(self, folders: Iterable[Path]) -> bool:
        """Take the next version from the first folder that holds it undamaged."""
        for folder in folders:
            path = self._path(folder, self.newest.version + 1)
            try:
                raw = path.read_bytes()
                if folder == self._folder:
                    self.newest = self.newest.follow(raw)
                else:
                    self.add(raw)
                return True
            except (OSError, PolicyRefusedError):
                continue
        return False

    @staticmethod
    def _path(folder: Path, version: int) -> Path:
        return folder / f"{version:08d}.root"
