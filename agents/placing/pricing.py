"""What a token costs under a policy, by where it left and how often it was asked.

Shape suffixes: N tokens, E exits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.features import SOFTMAX_V2, FeatureSchema
from offramp.controller.policies.protocols import IndexArray


def costs_for(schema: FeatureSchema | None, costs: CostTable) -> CostTable:
    """The table with the price of that schema's probe.

    None: no probe. A schema whose probe was not measured is priced as the table's own probe; but
    SOFTMAX_V2, which reads the whole head, as a head at least.
    """
    if schema is None:
        return costs.scaled("probe", 0.0).scaled("build", 0.0)
    if schema.name in costs.probes:
        return costs.with_probe(schema.name)
    if schema == SOFTMAX_V2 and 0 < costs.probe_s < costs.head_s:
        return costs.scaled("probe", costs.head_s / costs.probe_s)
    return costs


def places(
    schema: FeatureSchema | None, exits: tuple[int, ...], costs: CostTable
) -> NDArray[np.float64]:
    """Cost of leaving at each exit and at full depth, unasked, [E + 1].

    In units of a full-depth token's time: step, layers, filled layers and head. A row that leaves
    after a SOFTMAX_V2 probe pays no head: its token comes from the head that the probe ran.
    """
    prices = costs.at(1)
    head_s = 0.0 if schema == SOFTMAX_V2 else prices.head_s
    seconds = [
        prices.step_s + layer * prices.layer_s + (prices.layers - layer) * prices.fill_s + head_s
        for layer in exits
    ]
    return np.asarray([*seconds, prices.full_s], np.float64) / prices.full_s


def asking(schema: FeatureSchema | None, most: int, costs: CostTable) -> NDArray[np.float64]:
    """Cost of being asked 0, 1, … ``most`` times, probes and decisions, [most + 1]."""
    prices = costs_for(schema, costs).at(1)
    asked = np.arange(most + 1)
    seconds = asked * (prices.probe_s + prices.policy_s) + np.minimum(asked, 1) * prices.build_s
    return np.asarray(seconds / prices.full_s, np.float64)


def leaving(
    schema: FeatureSchema | None, exits: tuple[int, ...], costs: CostTable
) -> NDArray[np.float64]:
    """Cost of leaving at each exit and of full depth, asked at every exit on the way, [E + 1]."""
    asked_E1 = np.minimum(np.arange(1, len(exits) + 2), len(exits))
    return places(schema, exits, costs) + asking(schema, len(exits), costs)[asked_E1]


def token_costs(
    schema: FeatureSchema | None,
    exits: tuple[int, ...],
    taken_N: IndexArray,
    asked_N: IndexArray,
    costs: CostTable,
) -> NDArray[np.float64]:
    """Cost of each token, [N].

    Args:
        schema: What the policy reads.
        exits: Layers that ``taken_N`` counts.
        taken_N: Index of where each left; E for full depth.
        asked_N: Exits at which it was asked.
        costs: Measured costs.
    """
    placed_N = places(schema, exits, costs)[taken_N]
    return np.asarray(placed_N + asking(schema, len(exits), costs)[asked_N])
