"""Scores of a few tokens per row, and how the row's state compares to the last one scored.

Shape suffixes: N rows, K tokens, D width, M = K + 2.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.worker.probes.readout import FinalNorm, Readout

Scores = tuple[FloatArray, FloatArray, FloatArray, FloatArray]
"""Scores [N, K]; product with the last state, squared length, the last state's, each [N]."""


class Scorer(Protocol):
    """Scores the same tokens, state after state."""

    def score(self, x_ND: Tensor) -> Scores:
        """All of N rows, in float32 on the host; ``x_ND`` is then the last state."""
        ...

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        ...


def make_scorer(readout: Readout, tokens_NK: IntArray, x_ND: Tensor) -> Scorer:
    """The cheapest scorer that can serve the model; ``x_ND`` is what comes before the first."""
    if readout.is_host and readout.norm is not None:
        return FoldedScorer(readout, readout.norm, tokens_NK, x_ND)
    return StackScorer(readout, tokens_NK, x_ND)


class FoldedScorer:
    """In numpy: one product per row and probe gives scores, product with the last state, length.

    Below the K rows of the head, the norm's weight folded in, the matrix holds the last state and
    this one, in turn. These are copies, so the caller may overwrite its states.
    """

    def __init__(
        self, readout: Readout, norm: FinalNorm, tokens_NK: IntArray, x_ND: Tensor
    ) -> None:
        rows, scored = tokens_NK.shape
        self._host = readout.host
        self._norm = norm
        self._scored, self._last, self._here = scored, scored, scored + 1
        self._shelf = readout.shelf
        self._matrix_NMD = self._shelf.take((rows, scored + 2, readout.stack.width))
        self._offset_NK = readout.fold_rows(tokens_NK, self._matrix_NMD[:, :scored])
        self._matrix_NMD[:, self._last] = readout.host(x_ND)
        self._last_squares_N: FloatArray | None = None

    def __del__(self) -> None:
        self._shelf.put(self._matrix_NMD)

    def score(self, x_ND: Tensor) -> Scores:
        """All of N rows."""
        state_ND = self._host(x_ND)
        last, here = self._last, self._here
        self._matrix_NMD[:, here] = state_ND
        self._last, self._here = here, last
        if len(state_ND) == 1:
            product_NM = self._matrix_NMD[0].dot(state_ND[0])[None]
            rms: float | FloatArray = self._norm.rms(state_ND[0], float(product_NM[0, here]))
        else:
            product_NM = np.matmul(self._matrix_NMD, state_ND[:, :, None])[:, :, 0]
            rms = self._norm.rms_rows(state_ND, product_NM[:, here])[:, None]
        scores_NK = product_NM[:, : self._scored]
        np.divide(scores_NK, rms, scores_NK)
        if self._offset_NK is not None:
            scores_NK += self._offset_NK
        squares_N, last_squares_N = product_NM[:, here], self._last_squares_N
        if last_squares_N is None:
            first_ND = self._matrix_NMD[:, last]
            last_squares_N = np.einsum("nd,nd->n", first_ND, first_ND)
        self._last_squares_N = squares_N
        return scores_NK, product_NM[:, last], squares_N, last_squares_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._matrix_NMD = self._matrix_NMD[stay_N]
        if self._last_squares_N is not None:
            self._last_squares_N = self._last_squares_N[stay_N]
        if self._offset_NK is not None:
            self._offset_NK = self._offset_NK[stay_N]


class StackScorer:
    """Through the model's own norm, on its device: one transfer, so one synchronisation."""

    def __init__(self, readout: Readout, tokens_NK: IntArray, x_ND: Tensor) -> None:
        self.stack = readout.stack
        self._scored = tokens_NK.shape[1]
        tokens = torch.tensor(tokens_NK, device=self.stack.device)
        self._rows_NKD = self.stack.head_rows(tokens)
        self._last_ND = x_ND.float()

    def score(self, x_ND: Tensor) -> Scores:
        """All of N rows."""
        scores_NK = torch.bmm(self._rows_NKD, self.stack.norm(x_ND).unsqueeze(-1)).squeeze(-1)
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

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        stay = torch.from_numpy(stay_N).to(self.stack.device)
        self._rows_NKD, self._last_ND = self._rows_NKD[stay], self._last_ND[stay]
