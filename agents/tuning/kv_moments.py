"""Least squares from an exit's state to what each deeper layer reads: the map of the fill.

Closed form. Both sides are taken after the part of the norm that all layers share, so that the map
folds into the fill's one product. It is cut to a rank where that costs the predicted keys and
values least, over all layers together (reduced-rank regression, Izenman 1975).

Shape suffixes: L layers not executed, N tokens, D width, R rows of one layer's keys and values,
r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.worker.model.filling.kv_map import ExitMap

RIDGE = 1e-2
"""Penalty on the matrix, as a share of the states' mean square in one column."""


class FillMoments:
    """Sums over tokens at one exit: all that its least squares needs.

    Args:
        width: Width D of the states.
        deeper: Layers L behind the exit.
    """

    def __init__(self, width: int, deeper: int) -> None:
        self.count = 0
        self._x_D = torch.zeros(width, dtype=torch.float64)
        self._y_LD = torch.zeros(deeper, width, dtype=torch.float64)
        self._xx_DD = torch.zeros(width, width, dtype=torch.float64)
        self._xy_LDD = torch.zeros(deeper, width, width, dtype=torch.float64)

    def add(self, x_ND: Tensor, read_LND: Sequence[Tensor]) -> None:
        """Note normed states at the exit, and what each deeper layer reads of the same tokens.

        Products are float32 and their sums float64: a few hundred tokens add up in either.
        """
        self.count += len(x_ND)
        self._x_D += x_ND.sum(0)
        self._xx_DD += x_ND.T @ x_ND
        for place, read_ND in enumerate(read_LND):
            moved_ND = read_ND - x_ND
            self._y_LD[place] += moved_ND.sum(0)
            self._xy_LDD[place] += x_ND.T @ moved_ND

    def solve(self, rank: int, weights: Sequence[Tensor]) -> ExitMap:
        """The map for which the deeper layers' keys and values are nearest.

        Args:
            rank: r, at most D.
            weights: What each layer multiplies what it reads with, [R, D] of each.
        """
        x_D, y_LD = self._x_D / self.count, self._y_LD / self.count
        spread_DD = self._xx_DD - self.count * torch.outer(x_D, x_D)
        shared_LDD = self._xy_LDD - self.count * x_D[:, None] * y_LD[:, None]
        unit_DD = torch.eye(len(x_D), dtype=torch.float64)
        spread_DD += RIDGE * spread_DD.diagonal().mean() * unit_DD
        root_DD = torch.linalg.cholesky(spread_DD)
        # In coordinates in which states do not correlate, a direction's worth is its square.
        white_LDD = torch.linalg.solve_triangular(root_DD, shared_LDD, upper=False)
        worth_DD = torch.zeros_like(spread_DD)
        for white_DD, weight_RD in zip(white_LDD, weights, strict=True):
            made_DR = white_DD @ weight_RD.double().T
            worth_DD += made_DR @ made_DR.T
        _, vectors_DD = torch.linalg.eigh(worth_DD)  # ascending
        top_Dr = vectors_DD[:, -rank:]
        A_rD = torch.linalg.solve_triangular(root_DD.T, top_Dr, upper=True).T
        B_LDr = white_LDD.transpose(1, 2) @ top_Dr
        b_LD = y_LD - B_LDr @ (A_rD @ x_D)
        return ExitMap(*(part.float().contiguous() for part in (A_rD, B_LDr, b_LD)))
