"""Where translators start: the least squares from an exit's state to the last layer's.

Closed form, from a few batches: the ridge regression of what the deeper layers add, cut to the
translator's rank where that costs the predictions least (reduced-rank regression, Izenman 1975).

Shape suffixes: B rows, T tokens, N rows of any origin, D width, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from offramp.agents.tuning.distil import TrainableTranslator, fresh_translators, states_at
from offramp.agents.tuning.exit_losses import mean_loss, typical_rows
from offramp.worker.model.stack import LayerStack

RIDGE = 1e-3
"""Penalty on the matrix, as a share of the states' mean square in one column."""


class Moments:
    """Sums over one exit's tokens, in float64: all that its least squares needs.

    Args:
        width: Width D of the states.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.x_D, self.added_D = torch.zeros(2, width, dtype=torch.float64)
        self.xx_DD, self.xadded_DD = torch.zeros(2, width, width, dtype=torch.float64)

    def add(self, x_ND: Tensor, last_ND: Tensor) -> None:
        """Note states after the exit, and those after the last layer; sinks are left out."""
        kept_N = typical_rows(x_ND)
        x_ND, last_ND = (each[kept_N].to("cpu", torch.float64) for each in (x_ND, last_ND))
        added_ND = last_ND - x_ND
        self.count += len(x_ND)
        self.x_D += x_ND.sum(0)
        self.added_D += added_ND.sum(0)
        self.xx_DD += x_ND.T @ x_ND
        self.xadded_DD += x_ND.T @ added_ND

    def solve(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """A [r, D], B [D, r] and b [D] for which x + B A x + b is nearest to the last state."""
        x_D, added_D = self.x_D / self.count, self.added_D / self.count
        spread_DD = self.xx_DD - self.count * torch.outer(x_D, x_D)
        shared_DD = self.xadded_DD - self.count * torch.outer(x_D, added_D)
        penalty = RIDGE * spread_DD.diagonal().mean()
        matrix_DD = torch.linalg.solve(
            spread_DD + penalty * torch.eye(len(x_D), dtype=torch.float64), shared_DD
        )
        # Directions in which the predictions vary most; eigenvalues ascend.
        _, vectors_DD = torch.linalg.eigh(matrix_DD.T @ spread_DD @ matrix_DD)
        top_Dr = vectors_DD[:, -rank:]
        left_Dr, sizes_r, right_rr = torch.linalg.svd(matrix_DD @ top_Dr, full_matrices=False)
        # Both factors of one size, so that one learning rate suits both.
        down_rD = (left_Dr * sizes_r.sqrt()).T
        up_Dr = top_Dr @ right_rr.T * sizes_r.sqrt()
        return down_rD, up_Dr, added_D - up_Dr @ (down_rD @ x_D)


def start_translators(
    stack: LayerStack, exits: Sequence[int], rank: int, batches: Iterable[Tensor], seed: int
) -> dict[int, TrainableTranslator]:
    """Translators at the least squares, or at the identity where that loses less.

    Which loses less is judged on the first batch, which the least squares does not see: the exits
    of a model that was trained to exit are read best as they are.

    Args:
        stack: The model that the exits are in.
        exits: Layers to translate after.
        rank: r of each.
        batches: Token ids [B, T] of each, two batches at least.
        seed: Draws A where a translator starts at the identity.
    """
    first_BT, *others = batches
    moments = {layer: Moments(stack.width) for layer in exits}
    for tokens_BT in others:
        states, last_ND = states_at(stack, tokens_BT, exits)
        for layer in exits:
            moments[layer].add(states[layer], last_ND)
    states, last_ND = states_at(stack, first_BT, exits)
    modules = fresh_translators(stack, exits, rank, first_BT, seed)
    for layer, plain in modules.items():
        solved = copy.deepcopy(plain)
        solved.begin_at(*moments[layer].solve(rank))
        old, new = (mean_loss(stack, each, states[layer], last_ND) for each in (plain, solved))
        modules[layer] = solved if new < old else plain
    return modules
