"""The candidate table whose probe was recorded, as a file beside the traces.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.envs.traces.store import write_traces

CANDIDATES = "candidates.npy"


def save_candidates(folder: Path, candidates_VK: IntArray) -> None:
    """Write a candidate table beside the traces.

    Raises:
        TraceError: it cannot be written.
    """
    buffer = io.BytesIO()
    np.save(buffer, candidates_VK, allow_pickle=False)
    write_traces(folder / CANDIDATES, buffer.getvalue())


def load_candidates(folder: Path) -> IntArray:
    """The candidate table of a recording.

    Raises:
        TraceError: it is missing or damaged.
    """
    path = folder / CANDIDATES
    try:
        table: Any = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise TraceError(
            str(path), f"is no readable candidate table ({error})", "Record the traces again"
        ) from error
    if not isinstance(table, np.ndarray):
        raise TraceError(str(path), "is an archive of arrays, not one", "Record the traces again")
    if table.ndim != 2 or table.dtype != np.int32:
        raise TraceError(
            str(path),
            f"holds {table.dtype} of shape {table.shape}, not int32 [V, K]",
            "Record the traces again",
        )
    found: IntArray = table
    return found
