"""How a hidden state moved since the last probe.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import math

import numpy as np

from offramp.controller.features import BoolArray, FloatArray

SHORTEST = 1e-18
"""A shorter state counts as this long: the embedding of a padding token may be all zeros."""


class Motion:
    """Cosine to the last state, and ln of the lengths' ratio, from products computed elsewhere.

    Args:
        squares_N: Squared lengths of the first last states.
    """

    def __init__(self, squares_N: FloatArray) -> None:
        self._length_N = _lengths(squares_N)

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._length_N = self._length_N[stay_N]

    def one(self, dot: float, square: float) -> tuple[float, float]:
        """The columns of the only row.

        Args:
            dot: Product of its state and the last one.
            square: Its squared length.
        """
        last, length = float(self._length_N[0]), max(math.sqrt(square), SHORTEST)
        self._length_N[0] = length
        return dot / (length * last), math.log(length / last)

    def rows(self, dots_N: FloatArray, squares_N: FloatArray) -> FloatArray:
        """The same of N rows, [N, 2]."""
        length_N = _lengths(squares_N)
        ratio_N = length_N / self._length_N
        cosine_N = dots_N / (length_N * self._length_N)
        self._length_N = length_N
        return np.stack((cosine_N, np.log(ratio_N)), axis=-1)


def _lengths(squares_N: FloatArray) -> FloatArray:
    return np.maximum(np.sqrt(squares_N), np.float32(SHORTEST))
