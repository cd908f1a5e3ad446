"""A trace store that a recording begins, or goes on with.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offramp.agents.recording.documents import Document
from offramp.agents.recording.own_text import OWN_TEXT
from offramp.agents.recording.training_data import BEGUN, has_begun
from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.candidate_file import load_candidates, save_candidates
from offramp.envs.traces.store import MANIFEST, TraceStore, write_traces


class TextWindow(NamedTuple):
    """What is recorded of a document.

    Attributes:
        document: Names it.
        tokens: Token ids that are decoded: one more than the last recorded.
        first: Position of the first token recorded; the prompt, where the text is the model's own.
    """

    document: Document
    tokens: list[int]
    first: int = 0

    @property
    def rows(self) -> int:
        """Tokens recorded."""
        return len(self.tokens) - 1 - self.first


REMEDY = "Give the settings it began with, or choose another folder"


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a recording, or find the one that began so.

    Args:
        folder: Where it lies.
        settings: All that decides what is recorded and is known before a model is loaded.

    Raises:
        TraceError: what lies there is no recording, was begun under other settings, or the
            folder cannot be written.
    """
    if not has_begun(folder) and folder.exists() and any(folder.iterdir()):
        raise TraceError(str(folder), "holds something else than a recording", "Name a new folder")
    if not keeps_any(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_traces(folder / BEGUN, json.dumps(dict(settings), indent=1).encode())
        return
    began = _settings(folder)
    for name, value in json.loads(json.dumps(dict(settings))).items():
        # Older recordings say less of themselves; what they hold is compared when it is opened.
        if name in began and began[name] != value:
            raise TraceError(
                str(folder), f"was begun with {name} = {began[name]}, not {value}", REMEDY
            )


def keeps_any(folder: Path) -> bool:
    """Whether something that was recorded lies in a folder."""
    return (folder / OWN_TEXT).exists() or any(folder.glob("*.parquet"))


def forget_if_empty(folder: Path) -> None:
    """Remove what a recording began and kept nothing of: the next one starts anew."""
    if has_begun(folder) and not keeps_any(folder):
        shutil.rmtree(folder, ignore_errors=True)


def begun_store(
    folder: Path, header: TraceHeader, candidates_VK: IntArray, windows: Sequence[TextWindow]
) -> TraceStore:
    """A new store with its candidates, or the one there if it began just so.

    Args:
        folder: Where it lies.
        header: What all chunks share: model, schema, exits, layers.
        candidates_VK: The table that is to be probed.
        windows: All that is to be recorded, in order.

    Raises:
        TraceError: what lies there was recorded under other settings or of other documents.
    """
    if not any(folder.glob("*.parquet")):  # nothing that was recorded under any settings
        (folder / MANIFEST).unlink(missing_ok=True)
        store = TraceStore.create(folder, header)
        save_candidates(folder, candidates_VK)
        return store
    store = TraceStore.open(folder)
    if store.header != header:
        raise TraceError(str(folder), f"holds traces of {store.header}, not {header}", REMEDY)
    if not np.array_equal(load_candidates(folder), candidates_VK):
        raise TraceError(str(folder), "was recorded with other candidates", REMEDY)
    held = [(chunk.document, chunk.rows) for chunk in store.chunks]
    wanted = [(each.document.digest, each.rows) for each in windows]
    if held != wanted[: len(held)]:
        raise TraceError(str(folder), "holds other documents, or more tokens of each", REMEDY)
    return store


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / BEGUN
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TraceError(str(path), f"is unreadable ({error})", "Record anew") from error
