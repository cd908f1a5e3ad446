"""The stopping game of one token: what each leave and each jump costs, and its exact value.

Shape suffixes: N tokens, E exits, A actions; E1 = E + 1 exits with the end (all layers); S = E + 1
places to jump from: the start (before the first layer), then the exits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offramp.controller.costs import CostTable
from offramp.controller.features import FloatArray
from offramp.controller.router import targets


@dataclass(frozen=True, slots=True)
class JumpPrices:
    """What each move costs, in units of a full-depth token's time (``costs.full_s``).

    Attributes:
        hop_SE1: From a place (0: the start, s: exit s − 1) to an exit or the end: its layers, and
            probe and decision there (the end has none, but pays the head); inf backwards.
        leave_E: Leaving at an exit: filling the skipped layers' cache, and the head.
    """

    hop_SE1: FloatArray
    leave_E: FloatArray

    @classmethod
    def of(cls, costs: CostTable, exits: tuple[int, ...]) -> JumpPrices:
        """Prices at batch 1, such that visiting every exit costs what ``costs.leaving`` says."""
        places_S = np.asarray([0, *exits], np.float64)
        ends_E1 = np.asarray([*exits, costs.layers], np.float64)
        layers_SE1 = ends_E1[None, :] - places_S[:, None]
        arrival_E1 = np.full(len(exits) + 1, costs.probe_s + costs.policy_s)
        arrival_E1[-1] = costs.head_s
        hop_SE1 = layers_SE1 * costs.layer_s + arrival_E1
        hop_SE1[0] += costs.step_s
        hop_SE1[layers_SE1 <= 0] = np.inf
        leave_E = (costs.layers - ends_E1[:-1]) * costs.fill_s + costs.head_s
        return cls(
            (hop_SE1 / costs.full_s).astype(np.float32), (leave_E / costs.full_s).astype(np.float32)
        )


class StoppingGame:
    """Expected return of a stochastic policy, by a dynamic programme over the exits.

    With the answers of all exits recorded, the return of every path is known, so that the
    expectation over a policy's random choices is a polynomial in its probabilities: for actions
    {leave, go on} the sum over stopping times of the return weighted by products of survival
    probabilities, with jumps V(e) = Σ_a π(a|e) · (r(e, a) + V(target)). It is differentiated
    exactly, where PPO estimates the same gradient from samples.

    Args:
        prices: Of the moves.
        jumps: Longest jump, in exits.
    """

    def __init__(self, prices: JumpPrices, jumps: int) -> None:
        self.exits = len(prices.leave_E)
        self.target_EA = targets(self.exits, jumps)
        hop_SE1 = np.where(np.isfinite(prices.hop_SE1), prices.hop_SE1, 0)
        self._hop_SE1 = torch.from_numpy(hop_SE1.astype(np.float32))
        self._leave_E = torch.from_numpy(prices.leave_E)
        self.invalid_EA = torch.from_numpy(self.target_EA < 0)

    def values(self, log_pi_NEA: Tensor, quality_NE1: Tensor, lambda_N: Tensor) -> Tensor:
        """Expected return still to come, at each exit and at the end, [N, E + 1].

        Args:
            log_pi_NEA: Log-probabilities of the actions at each exit; invalid ones −inf.
            quality_NE1: Quality of leaving at each exit, and of full depth, in [0, 1].
            lambda_N: Preferences: quality that one full-depth token's time is worth.
        """
        pi_NEA = log_pi_NEA.exp()
        value = [quality_NE1[:, -1]]  # from the end backwards; the hop there has paid all
        for here in reversed(range(self.exits)):
            leave_N = quality_NE1[:, here] - lambda_N * self._leave_E[here]
            total_N = pi_NEA[:, here, 0] * leave_N
            for action, target in enumerate(self.target_EA[here].tolist()):
                if action > 0 and target >= 0:
                    onward_N = value[target - here - 1] - lambda_N * self._hop_SE1[here + 1, target]
                    total_N = total_N + pi_NEA[:, here, action] * onward_N
            value.insert(0, total_N)
        return torch.stack(value, dim=1)

    def expected_return(
        self, log_start_NE1: Tensor, log_pi_NEA: Tensor, quality_NE1: Tensor, lambda_N: Tensor
    ) -> Tensor:
        """Expected return of whole tokens divided by 1 + λ, as the environment's reward is, [N].

        Args:
            log_start_NE1: Log-probabilities of the first exit; the last column runs to the end.
            log_pi_NEA, quality_NE1, lambda_N: As for ``values``.
        """
        onward_NE1 = self.values(log_pi_NEA, quality_NE1, lambda_N)
        onward_NE1 = onward_NE1 - lambda_N[:, None] * self._hop_SE1[0]
        return (log_start_NE1.exp() * onward_NE1).sum(1) / (1 + lambda_N)
