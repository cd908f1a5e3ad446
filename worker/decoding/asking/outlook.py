"""What routing policies read of the engine and of a row's way so far: OUTLOOK_V1.

Shape suffixes: N rows, C columns of outlook.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from offramp.controller.features import FloatArray
from offramp.worker.decoding.sequence import Sequence

TOKENS_SCALE = 256
"""Divides counts of tokens so that the columns are of order one."""

MOST_WAITING = 8.0
"""Requests in line / slots; more counts as this."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is.

    Attributes:
        active: Number of rows that run.
        waiting: Requests in line.
        slots: Rows that can run.
    """

    active: int = 1
    waiting: int = 0
    slots: int = 1


def outlook_of(rows: Rows[Sequence], load: Load, layers: int, max_pending: int) -> FloatArray:
    """The columns of rows that are about to begin a token or are on their way, [N, C].

    Args:
        rows: The rows; their newest tokens are open.
        load: Rows that run and wait in the engine.
        layers: Number of layers of the model.
        max_pending: Tokens a row may have pending.
    """
    return np.array([_columns(row, load, layers, max_pending) for row in rows], np.float32)


def _columns(row: Sequence, load: Load, layers: int, max_pending: int) -> tuple[float, ...]:
    made = len(row.emitted) + len(row.drafts)
    left = row.request.sampling.max_tokens - made
    # In ``defer`` neighbours may have taken pending tokens along, which must change no decision.
    pending = row.early if row.request.kv_mode == "defer" else len(row.open) - 1
    pending = 0 if row.projects else pending
    last = row.drafts[-1].exit_layer if row.drafts else row.exit_layers[-1]
    return (
        made / TOKENS_SCALE,
        max(0, left) / TOKENS_SCALE,
        pending / max(1, max_pending),
        row.debt,
        row.acceptance,
        last / layers,
        load.active / load.slots,
        min(load.waiting / load.slots, MOST_WAITING),
    )
