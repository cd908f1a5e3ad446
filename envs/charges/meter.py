"""What one live row's tokens cost, step by step, by the cost table.

Shape suffixes: O objectives that cost, P = E + 2 places on the way.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.envs.charges.riders import Riders, added_by_riders
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.cores.batch import RewardArray

ONE = np.zeros(1, np.int64)


class TokenMeter:
    """The bill of one row at batch 1.

    Args:
        costs: Measured costs of the model that decodes, under the probe that is asked with.
        exits: Layers after which tokens can leave.
        layers: Its number of layers.
        rider_share: What a put-off token adds to a layer; None reads the table's spans.
        max_pending: Tokens that may be put off; None where skipped layers are projected.

    Attributes:
        objectives: Entries of a reward vector.
        probes: Probes made of the present token.

    Raises:
        ConfigError: the costs do not price put-off tokens.
    """

    def __init__(
        self,
        costs: CostTable,
        exits: tuple[int, ...],
        layers: int,
        *,
        rider_share: float | None,
        max_pending: int | None,
    ) -> None:
        self._token_costs = TokenCosts.of(costs, exits, fills=max_pending is None)
        self.objectives = self._token_costs.objectives
        self._layers = (*exits, layers)
        self._riders: Riders | None = None
        if max_pending is not None:
            added_MO = added_by_riders(costs, max_pending, rider_share)
            self._riders = Riders(exits, layers, max_pending, added_MO, 1)
        self.begin()

    def begin(self) -> None:
        """A new row, without debt."""
        self._before = -1
        self.probes = 0
        if self._riders is not None:
            self._riders.begin(ONE)

    def decide(self, here: int, target: int) -> RewardArray:
        """The way since the last decision, the probe and this one; to the end if that is next."""
        column = len(self._layers) - 1 if target == len(self._layers) - 1 else here
        paid_O = self._token_costs.policy_O + self._way(column)
        if here >= 0:
            paid_O += self._token_costs.probe_O
            if self.probes == 0:
                paid_O += self._token_costs.build_O
            self.probes += 1
        self._before = here
        return paid_O

    def unasked(self) -> RewardArray:
        """A whole token that nobody is asked about."""
        self._before, self.probes = -1, 0
        return self._way(len(self._layers) - 1)

    def end(self, column: int) -> None:
        """The present token came out there."""
        self._before, self.probes = -1, 0
        if self._riders is not None:
            self._riders.settle(ONE, ONE + column)

    def layer(self, column: int) -> int:
        """Layers executed of a token that leaves there."""
        return self._layers[column]

    def _way(self, column: int) -> RewardArray:
        sums_PO = self._token_costs.leave_OP.T
        if self._riders is not None:
            sums_PO = sums_PO + self._riders.way_BPO[0]
        way_O: RewardArray = sums_PO[column + 1] - sums_PO[self._before + 1]
        return way_O
