"""Who computes the candidate probe's columns: compiled code on the host, or the model's device.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1, BoolArray, FloatArray, IntArray
from offramp.worker.probes.candidates.kernel import (
    BEST,
    SMALLEST,
    Rows,
    candidate_features,
    remember,
)
from offramp.worker.probes.confidence import Confidence
from offramp.worker.probes.readout import Readout, raw


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


Start = tuple[IntArray, FloatArray, FloatArray]


class Scorer(Protocol):
    """Features of the same candidates, state after state."""

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """All columns, [N, F]; ``x_ND`` is then the last state, and the caller may overwrite it."""
        ...

    def best_N(self) -> IntArray:
        """The candidate of each row that the last state found best, [N]."""
        ...

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        ...


class HostScorer:
    """One compiled call per exit; the head's rows are read where they lie.

    Args:
        readout: The model's norm and head.
        head_VD: The head, or what of it is scored.
        candidates_NK: The candidates' tokens.
        start: Their places in ``head_VD`` [N, K]; last state [N, D], and memory [N, M].
        exits: Number of exits the policy may ask at.
        x_is_bits: Whether states come as bits.
    """

    def __init__(
        self,
        readout: Readout,
        head_VD: Rows,
        candidates_NK: IntArray,
        start: Start,
        exits: int,
        x_is_bits: bool,
    ) -> None:
        norm = readout.norm
        assert norm is not None  # another form is left to the model
        self._head_VD = head_VD
        self._norm = (readout.norm_2D, norm.eps, norm.is_centred)
        self._candidates_NK = candidates_NK
        self._places_NK, self._last_ND, self._memory_NM = start
        self._exits = exits
        self._are_bits = (head_VD.dtype == np.uint16, x_is_bits)

    @classmethod
    def of_rows(
        cls,
        readout: Readout,
        candidates_NK: IntArray,
        x_ND: Tensor,
        place_N: FloatArray,
        exits: int,
    ) -> HostScorer:
        """For rows with these candidates; ``x_ND`` is what comes before their first states."""
        head_VD, places_NK = readout.head_VD, candidates_NK
        if head_VD is None:
            head_VD = readout.head_rows(candidates_NK).reshape(-1, readout.stack.width)
            places = np.arange(candidates_NK.size, dtype=np.int32)
            places_NK = places.reshape(candidates_NK.shape)
        state_ND = packed(x_ND)
        is_bits = state_ND.dtype == np.uint16
        start = (places_NK, *remember(state_ND, is_bits, place_N))
        return cls(readout, head_VD, candidates_NK, start, exits, is_bits)

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """Compute all columns, [N, F]."""
        features_NF: FloatArray = candidate_features(
            self._head_VD, self._places_NK, packed(x_ND), self._norm, self._last_ND,
            self._memory_NM, depth, self._exits, self._are_bits,
        )  # fmt: skip
        return features_NF

    def best_N(self) -> IntArray:
        """Name the best candidates, [N]."""
        best_N: IntArray = _taken(self._candidates_NK, self._memory_NM[:, BEST])
        return best_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._candidates_NK = self._candidates_NK[stay_N]
        self._places_NK = self._places_NK[stay_N]
        self._last_ND, self._memory_NM = self._last_ND[stay_N], self._memory_NM[stay_N]


class DeviceScorer:
    """Through the model's own norm, on its device: one transfer, so one synchronisation."""

    def __init__(
        self,
        readout: Readout,
        candidates_NK: IntArray,
        x_ND: Tensor,
        place_N: FloatArray,
        exits: int,
    ) -> None:
        self._stack = readout.stack
        rows, self._scored = candidates_NK.shape
        tokens = torch.tensor(candidates_NK, device=self._stack.device)
        self._rows_NKD = self._stack.head_rows(tokens)
        self._candidates_NK = candidates_NK
        self._last_ND = x_ND.float()
        self._confidence = Confidence(rows, self._scored, exits)
        self._place_N = place_N

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """Compute all columns, [N, F]."""
        scores_NK, *products = self._score(x_ND)
        out_NF = np.empty((len(scores_NK), CANDIDATES_V1.width), np.float32)
        out_NF[:, :4], out_NF[:, 6:9] = self._confidence.rows(scores_NK)
        out_NF[:, 4:6] = motion_rows(*products)
        out_NF[:, 9] = depth
        out_NF[:, 10] = self._place_N
        return out_NF

    def best_N(self) -> IntArray:
        """Name the best candidates, [N]."""
        return _taken(self._candidates_NK, self._confidence.best_N)

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._candidates_NK = self._candidates_NK[stay_N]
        stay = torch.from_numpy(stay_N).to(self._stack.device)
        self._rows_NKD, self._last_ND = self._rows_NKD[stay], self._last_ND[stay]
        self._confidence.keep(stay_N)
        self._place_N = self._place_N[stay_N]

    def _score(self, x_ND: Tensor) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Scores [N, K]; product with the last state, squared length, the last state's, [N]."""
        stack = self._stack
        scores_NK = torch.bmm(self._rows_NKD, stack.norm(x_ND).unsqueeze(-1)).squeeze(-1)
        state_ND = x_ND.float()
        last_ND = self._last_ND
        products_N3 = torch.stack(
            [
                torch.linalg.vecdot(state_ND, last_ND),
                torch.linalg.vecdot(state_ND, state_ND),
                torch.linalg.vecdot(last_ND, last_ND),
            ],
            dim=-1,
        )
        # A copy where float() made none: the caller may overwrite its states.
        self._last_ND = state_ND.clone() if state_ND is x_ND else state_ND
        packed = torch.cat((scores_NK.float(), products_N3), dim=-1).cpu().numpy()
        return packed[:, : self._scored], packed[:, -3], packed[:, -2], packed[:, -1]


def make_scorer(
    readout: Readout, candidates_NK: IntArray, x_ND: Tensor, place_N: FloatArray, exits: int
) -> Scorer:
    """The cheapest scorer that can serve the model; ``x_ND`` is what comes before the first."""
    if readout.is_host and readout.norm is not None:
        return HostScorer.of_rows(readout, candidates_NK, x_ND, place_N, exits)
    return DeviceScorer(readout, candidates_NK, x_ND, place_N, exits)


def _taken(candidates_NK: IntArray, best_N: ArrayLike) -> IntArray:
    best_N1 = np.asarray(best_N, np.int64)[:, None]
    return np.take_along_axis(candidates_NK, best_N1, axis=1)[:, 0]


def packed(x_ND: Tensor) -> Rows:
    """States without gaps, as compiled code reads them; may share memory with ``x_ND``."""
    states: Rows = raw(x_ND)
    return states if states.flags.c_contiguous else states.copy()
