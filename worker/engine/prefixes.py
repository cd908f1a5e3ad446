"""Keys and values of prompts' beginnings, kept for the prompts to come that begin the same way."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from offramp.worker.model.kv import Entries

FIRST_CUT = 32
"""Tokens of the shortest beginning that is kept."""


def next_cut(read: int, chunk: int) -> int:
    """Where the chunk ends that begins after the tokens that were read.

    Chunks double from ``FIRST_CUT`` tokens up to the longest: what two prompts share is found to
    more than half even if it is short, and a long prompt costs few launches more.

    Args:
        read: 0, or where a chunk ends.
        chunk: Tokens of the longest chunk.
    """
    return min(max(2 * read, FIRST_CUT), chunk) if read < chunk else read + chunk


def beginnings(root: str, prompt: Sequence[int], chunk: int) -> Iterator[tuple[int, bytes]]:
    """Name what a prompt begins with: lengths at which it is cut, and a hash of each.

    Args:
        root: All else that decides the entries, and who may share them.
        prompt: Token ids.
        chunk: Tokens of the longest chunk; how many are read together decides the last bits of
            their entries.
    """
    digest = hashlib.sha256(f"{chunk} {len(root)} {root}".encode())
    start, end = 0, next_cut(0, chunk)
    while end <= len(prompt):
        digest.update(np.asarray(prompt[start:end], "<i8").tobytes())
        yield end, digest.copy().digest()
        start, end = end, next_cut(end, chunk)


class PrefixCache:
    """Entries by the name of the beginning that they end; the least recently used go first.

    Args:
        most_bytes: Memory that all of them may take.

    Attributes:
        nbytes: Memory that they take.
    """

    def __init__(self, most_bytes: int) -> None:
        self.nbytes = 0
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, Entries] = OrderedDict()

    def find(self, name: bytes) -> Entries | None:
        """Look entries up; that alone does not count as use."""
        return self._kept.get(name)

    def keep(self, names: Sequence[bytes], make: Callable[[], Entries]) -> None:
        """Keep the entries that end a beginning, and let go what was not used for longest.

        Args:
            names: The shorter beginnings that it goes on from, then its own. They count as used,
                the shortest last: without it the longer ones are of no use.
            make: Makes its entries, if they are not there.
        """
        if names[-1] not in self._kept:
            self._kept[names[-1]] = entries = make()
            self.nbytes += entries.nbytes
        for name in reversed(names):
            if name in self._kept:
                self._kept.move_to_end(name)
        while self.nbytes > self._most_bytes:
            _, gone = self._kept.popitem(last=False)
            self.nbytes -= gone.nbytes
