"""Put-off tokens of ``defer``: where they stand, and what carrying them along costs.

As in the engine, a token that left after layer e runs its deeper layers together with the row's
next token that comes past e, up to where that one leaves; at full depth nothing stays put off.

Shape suffixes: B rows, K of them, E exits, S = E + 1 segments between places, P = E + 2 places,
M = 1 + most tokens put off, O objectives that cost.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.envs.charges.token_costs import full_of, units_of
from offramp.envs.cores.batch import IndexArray, RewardArray


class Riders:
    """The put-off tokens of B rows.

    Args:
        exits: Layers at which a token can leave.
        layers: Number of layers.
        most: Tokens that a row may put off before its next one runs all layers.
        added_MO: What m more tokens in a layer add to its cost.
        num_envs: Number B.

    Attributes:
        count_B: Tokens put off.
        way_BPO: What carrying them adds to the way up to each place.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        layers: int,
        most: int,
        added_MO: RewardArray,
        num_envs: int,
    ) -> None:
        self._segment_S1 = np.diff([0, *exits, layers])[:, None].astype(np.float64)
        self._added_MO = added_MO
        self._most = most
        self._exits = len(exits)
        self._standing_BE = np.zeros((num_envs, len(exits)), np.int64)
        self.count_B = np.zeros(num_envs, np.int64)
        self.way_BPO = np.zeros((num_envs, len(exits) + 2, added_MO.shape[1]), np.float64)

    def begin(self, place_K: IndexArray) -> None:
        """Nothing is put off."""
        self._standing_BE[place_K] = 0
        self._show(place_K)

    def settle(self, place_K: IndexArray, column_K: IndexArray) -> None:
        """A token came out at a column: it stands there, and those it carried with it; E: none."""
        standing_KE = self._standing_BE[place_K]
        passed_KE = np.arange(self._exits) <= column_K[:, None]
        moved_K = (standing_KE * passed_KE).sum(-1) + 1
        standing_KE[passed_KE] = 0
        left_K = np.flatnonzero(column_K < self._exits)
        standing_KE[left_K, column_K[left_K]] = moved_K[left_K]
        self._standing_BE[place_K] = standing_KE
        self._show(place_K)

    def are_full(self, place_K: IndexArray) -> np.ndarray:
        """Which rows' next token must run all layers, unasked; bool [K]."""
        full_K: np.ndarray = self.count_B[place_K] >= self._most
        return full_K

    def _show(self, place_K: IndexArray) -> None:
        # Aboard a segment are all that stand at or before its beginning.
        aboard_KE = self._standing_BE[place_K].cumsum(-1)
        self.count_B[place_K] = aboard_KE[:, -1]
        added_KEO = self._added_MO[aboard_KE] * self._segment_S1[1:]
        self.way_BPO[place_K, 2:] = added_KEO.cumsum(1)


def added_by_riders(costs: CostTable, most: int, share: float | None) -> RewardArray:
    """What 0, 1, … tokens more add to the cost of one row's layer, [M, O].

    In units of a full-depth token's seconds and joules.

    Args:
        costs: Measured; its spans time a layer over several tokens of one row.
        most: Tokens at most.
        share: Instead of the spans: what each adds, as a share of a layer with one.

    Raises:
        ConfigError: neither a share nor spans that reach so far.
    """
    if share is None and not costs.spans:
        raise ConfigError(
            "rider_share",
            "is needed: the cost table does not time a layer over several tokens",
            "Profile it, or give a share of a layer from 0 to 1",
        )
    if share is not None and not share >= 0:
        raise ConfigError("rider_share", f"{share} is below 0", "Give a share of a layer")
    alone = costs.at(1)
    rows = []
    for unit in units_of(alone):
        one = getattr(alone, f"layer_{unit}")
        if share is not None:
            added_M = share * one * np.arange(most + 1)
        else:
            layers = [getattr(costs.launch(1 + m), f"layer_{unit}") for m in range(most + 1)]
            added_M = np.array(layers) - layers[0]
        rows.append(added_M / full_of(alone, unit))
    return np.stack(rows, axis=1)
