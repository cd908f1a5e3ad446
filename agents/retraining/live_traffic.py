"""Live traffic as workers kept it, read beside the traces that policies were trained on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.store import MANIFEST, ChunkEntry, TraceStore
from offramp.envs.traces.tokens import TokenTraces

ALIKE = ("model", "schema", "exits", "translators", "layers")
"""What traffic must share with the training traces to be compared, or learned from together."""


class LiveChunk(NamedTuple):
    """One request's chunk, where it lies."""

    store: TraceStore
    entry: ChunkEntry

    @property
    def document(self) -> str:
        """Name of the request, which is drawn at random."""
        return self.entry.document


class LiveTraffic:
    """What all workers of a channel keep now.

    Args:
        folder: Holds a folder per worker.
        header: The training traces' header; traffic that differs in it is left out.
        candidates_VK: The table that they were probed with; traffic of others is left out.

    Attributes:
        chunks: What is comparable, by request; oldest first in each worker.
        others: Why the rest is not, a reason a store.
    """

    def __init__(self, folder: Path, header: TraceHeader, candidates_VK: IntArray) -> None:
        self.chunks: dict[str, LiveChunk] = {}
        self.others: list[str] = []
        self._header = header
        for path in sorted(folder.glob(f"*/*/{MANIFEST}")):
            store = TraceStore.open(path.parent)
            if other := _difference(store, header, candidates_VK):
                self.others.append(other)
                continue
            self.chunks |= {each.document: LiveChunk(store, each) for each in store.chunks}

    def tokens(self, documents: Collection[str]) -> int:
        """Tokens of some requests."""
        return sum(self.chunks[each].entry.rows for each in documents)

    def load(self, documents: Collection[str]) -> dict[str, TraceChunk]:
        """The chunks of some requests; those that gave way to newer ones meanwhile are missing."""
        found = {}
        for each in documents:
            store, entry = self.chunks[each]
            if (store.folder / entry.name).exists():
                found[each] = store.load(entry)
        return found

    def read(self, documents: Collection[str]) -> TokenTraces:
        """The tokens of some requests.

        Raises:
            TraceError: none of them is there any more, or one is damaged.
        """
        chunks = self.load(documents).values()
        header = replace(self._header, width=0)
        return TokenTraces.from_chunks(header, [replace(each, state_TED=None) for each in chunks])


def _difference(store: TraceStore, header: TraceHeader, candidates_VK: IntArray) -> str:
    """Why a store is not comparable with the training traces; "" if it is."""
    for name in ALIKE:
        own, theirs = getattr(store.header, name), getattr(header, name)
        if own != theirs:
            return f"has {name} {own}, and the training traces have {theirs}"
    try:
        same = np.array_equal(load_candidates(store.folder), candidates_VK)
    except TraceError as error:
        return str(error)
    return "" if same else "was probed with other candidates than the training traces"
