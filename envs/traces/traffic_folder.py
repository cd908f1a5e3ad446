"""Keeps a worker's live traffic on disk: stores within a bound, written by its own thread."""

from __future__ import annotations

import hashlib
import logging
import queue
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.controller.strict import canonical_json
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import MANIFEST, TraceStore

TRAFFIC = "traffic"
"""The split of chunks that no one has yet chosen a use for."""

MIB = 2**20
MOST_QUEUED = 64
"""Chunks that wait for the disk; one more is lost."""

_logger = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """One chunk, and what its store must share."""

    header: TraceHeader
    candidates_VK: IntArray
    chunk: TraceChunk


class TrafficFolder:
    """Keeps chunks on disk, never more than fit, and never at the cost of whoever hands them over.

    Chunks of one header and one candidate table share a store, in a folder named by a hash of both.
    When there are too many, the oldest chunks of the store that was written longest ago go first.

    Args:
        folder: Made when the first chunk comes. One process writes there.
        most_mb: Most MiB of all chunks.

    Attributes:
        kept: Chunks written so far.
        dropped: Chunks that gave way to newer ones.
        lost: Chunks that never reached the disk: it was full, gone or too slow.
    """

    def __init__(self, folder: Path, most_mb: float) -> None:
        self.kept = self.dropped = self.lost = 0
        self._folder, self._most = folder, int(most_mb * MIB)
        self._queue: queue.Queue[Recorded | None] = queue.Queue(MOST_QUEUED)
        self._is_failing = False
        self._held = 0
        # The store written last, and what it is for; its table is held, so the id stays its own.
        self._key: tuple[TraceHeader, int] | None = None
        self._store_now: TraceStore
        self._table_VK: IntArray
        self._thread = threading.Thread(target=self._run, name="offramp-traffic", daemon=True)
        self._thread.start()

    def keep(self, header: TraceHeader, candidates_VK: IntArray, chunk: TraceChunk) -> None:
        """Have a chunk written, soon; it is lost if too many wait."""
        try:
            self._queue.put_nowait(Recorded(header, candidates_VK, chunk))
        except queue.Full:
            self.lost += 1

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (recorded := self._queue.get()) is not None:
            try:
                self._write(recorded)
                self._is_failing = False
            except (OSError, TraceError) as error:
                self.lost += 1
                if not self._is_failing:  # once, until it works again
                    _logger.warning("live traffic is not kept: %s", error)
                self._is_failing = True

    def _write(self, recorded: Recorded) -> None:
        store = self._store(recorded)
        store.append(recorded.chunk, TRAFFIC)
        self.kept += 1
        self._held += (store.folder / store.chunks[-1].name).stat().st_size
        if self._held > self._most:
            self._make_room(store)

    def _store(self, recorded: Recorded) -> TraceStore:
        key = (recorded.header, id(recorded.candidates_VK))
        if key == self._key and (self._store_now.folder / MANIFEST).exists():
            return self._store_now
        folder = self._folder / _name(recorded)
        if (folder / MANIFEST).exists():
            store = TraceStore.open(folder)
        else:
            save_candidates(folder, recorded.candidates_VK)
            store = TraceStore.create(folder, recorded.header)
        self._held = sum(map(_size, self._folder.glob("*/*.parquet")))
        self._key, self._store_now, self._table_VK = key, store, recorded.candidates_VK
        return store

    def _make_room(self, newest: TraceStore) -> None:
        for store in (*self._older(newest), newest):
            count = 0
            while self._held > self._most and count < len(store.chunks) - (store is newest):
                self._held -= _size(store.folder / store.chunks[count].name)
                count += 1
            if count:
                store.drop(count)
                self.dropped += count
            if not store.chunks:
                shutil.rmtree(store.folder, ignore_errors=True)

    def _older(self, newest: TraceStore) -> list[TraceStore]:
        """The other stores, the one that was written longest ago first."""
        manifests = sorted(
            self._folder.glob(f"*/{MANIFEST}"), key=lambda each: each.stat().st_mtime
        )
        folders = [each.parent for each in manifests if each.parent != newest.folder]
        return [TraceStore.open(each) for each in folders]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _name(recorded: Recorded) -> str:
    whole = hashlib.sha256(canonical_json(asdict(recorded.header)))
    whole.update(recorded.candidates_VK.tobytes())
    return whole.hexdigest()[:16]
