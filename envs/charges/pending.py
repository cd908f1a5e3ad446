"""Pending tokens of ``defer``: where they stand, and what carrying them along costs.

As in the engine, a token that left after layer e runs its deeper layers together with the row's
next token that comes past e, up to where that one leaves; at full depth nothing stays pending.

Shape suffixes: B rows, K of them, E exits, S = E + 1 segments between places, P = E + 2 places,
M = 1 + most pending tokens, O objectives that cost.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.envs.charges.token_costs import TokenCosts, full_of, units_of
from offramp.envs.cores.batch import IndexArray, RewardArray


class PendingTokens:
    """The pending tokens of B rows.

    Args:
        exits: Layers at which a token can leave.
        layers: Number of layers.
        most: Tokens that a row may leave pending before its next one runs all layers.
        added_MO: What m more tokens in a layer add to its cost.
        num_envs: Number B of rows.

    Attributes:
        count_B: Number of pending tokens of each row.
        way_BPO: What carrying them adds to the way up to each place.
    """

    def __init__(
        self, exits: tuple[int, ...], layers: int, most: int, added_MO: RewardArray, num_envs: int
    ) -> None:
        self._segment_S1 = np.diff([0, *exits, layers])[:, None].astype(np.float64)
        self._added_MO = added_MO
        self._most = most
        self._exits = len(exits)
        self._standing_BE = np.zeros((num_envs, len(exits)), np.int64)
        self.count_B = np.zeros(num_envs, np.int64)
        self.way_BPO = np.zeros((num_envs, len(exits) + 2, added_MO.shape[1]), np.float64)

    def begin(self, place_K: IndexArray) -> None:
        """Start without pending tokens."""
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


def added_by_pending(costs: CostTable, most: int, share: float | None) -> RewardArray:
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
            "pending_share",
            "is needed: the cost table does not time a layer over several tokens",
            "Profile it, or give a share of a layer from 0 to 1",
        )
    if share is not None and not share >= 0:
        raise ConfigError("pending_share", f"{share} is below 0", "Give a share of a layer")
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


ONE = np.zeros(1, np.int64)


class TokenMeter:
    """The bill of one row at batch 1.

    Args:
        costs: Measured costs of the model that decodes, under the probe that is asked with.
        exits: Layers after which tokens can leave.
        layers: Its number of layers.
        pending_share: What a pending token adds to a layer; None reads the table's spans.
        max_pending: Tokens that may be pending; None where skipped layers are projected.
        adapters: Exits with an adapter layer.

    Attributes:
        objectives: Entries of a reward vector.
        probes: Probes made of the present token.

    Raises:
        ConfigError: the costs do not price pending tokens.
    """

    def __init__(
        self,
        costs: CostTable,
        exits: tuple[int, ...],
        layers: int,
        *,
        pending_share: float | None,
        max_pending: int | None,
        adapters: tuple[int, ...] = (),
    ) -> None:
        fills = max_pending is None
        self._token_costs = TokenCosts.of(costs, exits, fills=fills, adapters=adapters)
        self.objectives = self._token_costs.objectives
        self._layers = (*exits, layers)
        self._pending: PendingTokens | None = None
        if max_pending is not None:
            added_MO = added_by_pending(costs, max_pending, pending_share)
            self._pending = PendingTokens(exits, layers, max_pending, added_MO, 1)
        self.begin()

    def begin(self) -> None:
        """A new row, without debt."""
        self._before = -1
        self.probes = 0
        if self._pending is not None:
            self._pending.begin(ONE)

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
        if self._pending is not None:
            self._pending.settle(ONE, ONE + column)

    def layer(self, column: int) -> int:
        """Layers executed of a token that leaves there."""
        return self._layers[column]

    def _way(self, column: int) -> RewardArray:
        sums_PO = self._token_costs.leave_OP.T
        if self._pending is not None:
            sums_PO = sums_PO + self._pending.way_BPO[0]
        way_O: RewardArray = sums_PO[column + 1] - sums_PO[self._before + 1]
        return way_O
