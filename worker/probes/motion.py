"""How a hidden state moved since the last probe: cosine, and ln of the lengths' ratio.

Shape suffix: N rows.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.features import FloatArray
from offramp.worker.probes.candidates.kernel import SMALLEST


def motion_rows(
    dots_N: FloatArray, squares_N: FloatArray, last_squares_N: FloatArray
) -> FloatArray:
    """Both columns of N rows, [N, 2].

    Args:
        dots_N: Product of each state and the last one.
        squares_N, last_squares_N: Their squared lengths.
    """
    squares_N = np.maximum(squares_N, np.float32(SMALLEST))
    last_squares_N = np.maximum(last_squares_N, np.float32(SMALLEST))
    cosine_N = dots_N / np.sqrt(squares_N) / np.sqrt(last_squares_N)
    return np.stack((cosine_N, 0.5 * np.log(squares_N / last_squares_N)), axis=-1)
