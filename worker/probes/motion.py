"""How a hidden state moved since the last probe.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import compress

import numpy as np

from offramp.controller.features import BoolArray, FloatArray

SHORTEST = 1e-18
"""A shorter state counts as this long: the embedding of a padding token may be all zeros."""


class Motion:
    """Cosine to the last state, and ln of the lengths' ratio, from products computed elsewhere.

    Args:
        squares_N: Squared lengths of the states before the first.
    """

    def __init__(self, squares_N: Iterable[float]) -> None:
        self._length_N = [max(math.sqrt(square), SHORTEST) for square in squares_N]

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._length_N = list(compress(self._length_N, stay_N.tolist()))

    def one(self, dot: float, square: float) -> tuple[float, float]:
        """The columns of the only row.

        Args:
            dot: Product of its state and the last one.
            square: Its squared length.
        """
        last, length = self._length_N[0], max(math.sqrt(square), SHORTEST)
        self._length_N[0] = length
        return dot / (length * last), math.log(length / last)

    def rows(self, dots_N: FloatArray, squares_N: FloatArray) -> FloatArray:
        """The same of N rows, [N, 2]."""
        last_N = np.asarray(self._length_N)
        length_N = np.maximum(np.sqrt(squares_N), SHORTEST)
        self._length_N = length_N.tolist()
        return np.stack((dots_N / (length_N * last_N), np.log(length_N / last_N)), axis=-1)
