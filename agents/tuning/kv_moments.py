"""Least squares from an exit's state to what each deeper layer reads: the map of the fill.

Closed form. Both sides are taken after the part of the norm that all layers share, so that the map
folds into the fill's product. It is cut to a rank where that costs the predicted keys and values
least, over all layers together (reduced-rank regression, Izenman 1975).

Shape suffixes: L layers not executed, N tokens, D width, K values of one layer, R rows of one
layer's keys and values, r rank; I inputs: D, or D + K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.worker.model.filling.kv_map import ExitMap

RIDGE = 1e-2
"""Penalty on the matrix, as a share of the inputs' variance in one column: of states, of values."""

WORTH = 0.1
"""The token before is read where that takes away so much of the squared error of keys and values
that the state alone leaves: it makes the product for the fill larger by K / D."""


class FillMoments:
    """Sums over tokens at one exit: all that its least squares needs.

    Args:
        width: Width D of the states.
        weights: What each deeper layer multiplies what it reads with, [R, D] of each of L.
        values: K, what the first of them keeps of a token as values.
    """

    def __init__(self, width: int, weights: Sequence[Tensor], values: int = 0) -> None:
        self.count = 0
        self._width, self._weights = width, list(weights)
        deeper, inputs = len(weights), width + values
        self._x_I = torch.zeros(inputs, dtype=torch.float64)
        self._y_LD = torch.zeros(deeper, width, dtype=torch.float64)
        self._xx_II = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._xy_LID = torch.zeros(deeper, inputs, width, dtype=torch.float64)
        self._made_L = torch.zeros(deeper, dtype=torch.float64)

    def add(self, x_NI: Tensor, read_LND: Sequence[Tensor]) -> None:
        """Note what each deeper layer reads of tokens, in the order of the layers.

        Products are float32 and their sums float64: a few hundred tokens add up in either.

        Args:
            x_NI: Normed states at the exit, and behind them the values that the first deeper layer
                keeps of each token's predecessor, if there are to be any.
            read_LND: Normed states in front of the layers.
        """
        self.count += len(x_NI)
        self._x_I += x_NI.sum(0)
        self._xx_II += x_NI.T @ x_NI
        for place, (read_ND, weight_RD) in enumerate(zip(read_LND, self._weights, strict=True)):
            moved_ND = read_ND - x_NI[:, : self._width]
            self._y_LD[place] += moved_ND.sum(0)
            self._xy_LID[place] += x_NI.T @ moved_ND
            self._made_L[place] += (moved_ND @ weight_RD.T).square().sum()

    def solve(self, rank: int) -> ExitMap:
        """The map for which the deeper layers' keys and values are nearest.

        It reads the token before only if that is worth it (``WORTH``).

        Args:
            rank: r, at most D.
        """
        alone, left = self._solve(rank, self._width)
        if len(self._x_I) == self._width:
            return alone
        both, left_by_both = self._solve(rank, len(self._x_I))
        return both if left_by_both < (1 - WORTH) * left else alone

    def _solve(self, rank: int, inputs: int) -> tuple[ExitMap, float]:
        """The map that reads so many inputs, and the squared error that it leaves."""
        x_I, y_LD = self._x_I[:inputs] / self.count, self._y_LD / self.count
        spread_II = self._xx_II[:inputs, :inputs] - self.count * torch.outer(x_I, x_I)
        shared_LID = self._xy_LID[:, :inputs] - self.count * x_I[:, None] * y_LD[:, None]
        spread_II += torch.diag(self._ridge(spread_II.diagonal()))
        root_II = torch.linalg.cholesky(spread_II)
        # In coordinates in which inputs do not correlate, a direction's worth is its square.
        white_LID = torch.linalg.solve_triangular(root_II, shared_LID, upper=False)
        worth_II = torch.zeros_like(spread_II)
        shifted = 0.0
        for white_ID, weight_RD, y_D in zip(white_LID, self._weights, y_LD, strict=True):
            made_IR = white_ID @ weight_RD.double().T
            worth_II += made_IR @ made_IR.T
            shifted += self.count * float((weight_RD.double() @ y_D).square().sum())
        worths_I, vectors_II = torch.linalg.eigh(worth_II)  # ascending
        top_Ir = vectors_II[:, -rank:]
        A_rI = torch.linalg.solve_triangular(root_II.T, top_Ir, upper=True).T
        B_LDr = white_LID.transpose(1, 2) @ top_Ir
        b_LD = y_LD - B_LDr @ (A_rI @ x_I)
        left = float(self._made_L.sum() - worths_I[-rank:].sum()) - shifted
        return ExitMap(*(part.float().contiguous() for part in (A_rI, B_LDr, b_LD))), left

    def _ridge(self, variance_I: Tensor) -> Tensor:
        """The penalty on each input, by the mean over its kind."""
        parts = variance_I[: self._width], variance_I[self._width :]
        return torch.cat([RIDGE * part.mean().expand_as(part) for part in parts if len(part)])
