"""What rules read of OUTLOOK_V1, and the routes of those that ask exit by exit.

Shape suffixes: N rows, C outlook columns.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.features import OUTLOOK_V1, BoolArray, FloatArray
from offramp.controller.policies.protocols import IndexArray

TOKENS = np.float32(256)
"""Tokens per unit of ``step`` and ``left``."""

_STEP, _LEFT = OUTLOOK_V1.index("step"), OUTLOOK_V1.index("left")


def progress(outlook_NC: FloatArray) -> FloatArray:
    """t / N: the step within the completion over the most tokens it may have, in [0, 1], [N]."""
    step_N = outlook_NC[:, _STEP]
    most_N = np.maximum(step_N + outlook_NC[:, _LEFT], 1 / TOKENS)
    return np.asarray(step_N / most_N)


def at_first(outlook_NC: FloatArray) -> IndexArray:
    """Every row is asked at the first exit, [N]."""
    return np.zeros(len(outlook_NC), np.int64)


def leave_or_next(here: int, leave_N: BoolArray) -> IndexArray:
    """Rows that leave stay at ``here``; the others are asked at the next exit, [N]."""
    return np.where(leave_N, here, here + 1)
