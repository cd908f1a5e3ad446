"""A trace store that a recording begins, or goes on with.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offramp.agents.corpus import Document
from offramp.agents.study import FACTS, load_candidates, save_candidates
from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceHeader
from offramp.envs.store import MANIFEST, TraceStore

Window = tuple[Document, list[int]]
"""A document, and the tokens of it that are decoded: one more than are recorded."""

REMEDY = "Resume with the settings it began with, or choose another folder"


def is_whole(folder: Path) -> bool:
    """Whether a recording was carried to its end: its last file is there."""
    return (folder / FACTS).exists()


def require_no_store(folder: Path) -> None:
    """Refuse a folder that already holds traces.

    Raises:
        TraceError: it does.
    """
    if (folder / MANIFEST).exists():
        raise TraceError(
            str(folder),
            "already holds a trace store",
            "Choose another folder, or go on with a recording that was cut off (--resume)",
        )


def begun_store(
    folder: Path, header: TraceHeader, candidates_VK: IntArray, windows: Sequence[Window]
) -> TraceStore:
    """A new store with its candidates, or the one there if it began just so.

    Args:
        folder: Where it lies.
        header: Of what is to be recorded.
        candidates_VK: The table that is to be probed.
        windows: All that is to be recorded, in order.

    Raises:
        TraceError: what lies there was recorded under other settings or of other documents.
    """
    if not (folder / MANIFEST).exists():
        store = TraceStore.create(folder, header)
        save_candidates(folder, candidates_VK)
        return store
    store = TraceStore.open(folder)
    if store.header != header:
        raise TraceError(str(folder), f"holds traces of {store.header}, not {header}", REMEDY)
    if not store.chunks:
        save_candidates(folder, candidates_VK)
    if not np.array_equal(load_candidates(folder), candidates_VK):
        raise TraceError(str(folder), "was recorded with other candidates", REMEDY)
    held = [(chunk.document, chunk.rows) for chunk in store.chunks]
    wanted = [(document.digest, len(tokens) - 1) for document, tokens in windows]
    if held != wanted[: len(held)]:
        raise TraceError(str(folder), "holds other documents, or more tokens of each", REMEDY)
    return store
