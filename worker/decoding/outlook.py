"""What the engine knows of a row without a probe: OUTLOOK_V1.

Shape suffix: C columns.
"""

from __future__ import annotations

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


def outlook_of(row: Sequence, load: Load, layers: int, max_pending: int) -> FloatArray:
    """The columns of a row that is about to begin a token or is on its way, [1, C].

    Args:
        row: The row; its newest token is open.
        load: Rows that run and wait in the engine.
        layers: Number of layers of the model.
        max_pending: Tokens a row may have pending.
    """
    made = len(row.emitted) + len(row.drafts)
    left = row.request.sampling.max_tokens - made
    # In ``defer`` neighbours may have taken pending tokens along, which must change no decision.
    pending = row.early if row.request.kv_mode == "defer" else len(row.open) - 1
    pending = 0 if row.projects else pending
    last = row.drafts[-1].exit_layer if row.drafts else row.exit_layers[-1]
    return np.array(
        [
            (
                made / TOKENS_SCALE,
                max(0, left) / TOKENS_SCALE,
                pending / max(1, max_pending),
                row.debt,
                row.acceptance,
                last / layers,
                load.active / load.slots,
                min(load.waiting / load.slots, MOST_WAITING),
            )
        ],
        np.float32,
    )
