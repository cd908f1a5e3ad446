"""How a hidden state moved since the last probe: cosine, and ln of the lengths' ratio.

Shape suffix: N rows.
"""

from __future__ import annotations

import math

import numpy as np

from offramp.controller.features import FloatArray

SMALLEST = 1e-36
"""A smaller squared length counts as this: the embedding of a padding token may be all zeros."""


def motion_one(dot: float, square: float, last_square: float) -> tuple[float, float]:
    """Both columns of one row.

    Args:
        dot: Product of this state and the last one.
        square, last_square: Their squared lengths.
    """
    square, last_square = max(square, SMALLEST), max(last_square, SMALLEST)
    return dot / math.sqrt(square) / math.sqrt(last_square), 0.5 * math.log(square / last_square)


def motion_rows(
    dots_N: FloatArray, squares_N: FloatArray, last_squares_N: FloatArray
) -> FloatArray:
    """The same of N rows, [N, 2]."""
    squares_N = np.maximum(squares_N, np.float32(SMALLEST))
    last_squares_N = np.maximum(last_squares_N, np.float32(SMALLEST))
    cosine_N = dots_N / np.sqrt(squares_N) / np.sqrt(last_squares_N)
    return np.stack((cosine_N, 0.5 * np.log(squares_N / last_squares_N)), axis=-1)
