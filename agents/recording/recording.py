"""A trace store that a recording begins, or goes on with.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offramp.agents.recording.documents import Document
from offramp.agents.recording.training_data import FACTS, load_candidates, save_candidates
from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.store import MANIFEST, TraceStore, write_traces

Window = tuple[Document, list[int]]
"""A document, and the tokens of it that are decoded: one more than are recorded."""

BEGUN = "recording.json"
"""What a resumed recording must share, and traces do not tell."""

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
    folder: Path,
    header: TraceHeader,
    dtype: str,
    candidates_VK: IntArray,
    windows: Sequence[Window],
) -> TraceStore:
    """A new store with its candidates, or the one there if it began just so.

    Args:
        folder: Where it lies.
        header: What all chunks share: model, schema, exits, layers.
        dtype: Name of the dtype that the weights are decoded in.
        candidates_VK: The table that is to be probed.
        windows: All that is to be recorded, in order.

    Raises:
        TraceError: what lies there was recorded under other settings or of other documents.
    """
    if not any(folder.glob("*.parquet")):  # nothing that was recorded under any settings
        (folder / MANIFEST).unlink(missing_ok=True)
        store = TraceStore.create(folder, header)
        save_candidates(folder, candidates_VK)
        write_traces(folder / BEGUN, json.dumps({"dtype": dtype}).encode())
        return store
    store = TraceStore.open(folder)
    if store.header != header:
        raise TraceError(str(folder), f"holds traces of {store.header}, not {header}", REMEDY)
    if dtype != _begun_dtype(folder):
        raise TraceError(str(folder), f"was not recorded in {dtype}", REMEDY)
    if not np.array_equal(load_candidates(folder), candidates_VK):
        raise TraceError(str(folder), "was recorded with other candidates", REMEDY)
    held = [(chunk.document, chunk.rows) for chunk in store.chunks]
    wanted = [(document.digest, len(tokens) - 1) for document, tokens in windows]
    if held != wanted[: len(held)]:
        raise TraceError(str(folder), "holds other documents, or more tokens of each", REMEDY)
    return store


def _begun_dtype(folder: Path) -> str:
    path = folder / BEGUN
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["dtype"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise TraceError(str(path), f"is unreadable ({error})", "Record anew") from error
