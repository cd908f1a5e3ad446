"""What a token costs, by where it leaves and how often it is asked on the way.

Costs are in units of one token that is decoded alone at full depth.

Shape suffixes: O objectives that cost (latency; energy if known), N tokens, E exits, E1 = exits and
full depth, P = E + 2 places on the way: before the first layer, E exits, full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs.prices import PARTS, Prices
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import SOFTMAX_V2, FeatureSchema

Float64Array = NDArray[np.float64]
Unit = Literal["s", "j"]

LATENCY, ENERGY = 0, 1
"""Rows of all arrays here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCosts:
    """Shares of a full-depth token's seconds, and joules, that the parts of a token take.

    Attributes:
        leave_OP: Cost of coming to each place and leaving there, never asked:
            step + (e + a)·layer + (L − e)·fill + head, with a adapter layers on the way; 0 before
            the first layer.
        probe_O: Cost of one probe.
        policy_O: Cost of one decision.
        build_O: Cost of preparing a token's probes, paid with the first.
    """

    leave_OP: Float64Array
    probe_O: Float64Array
    policy_O: Float64Array
    build_O: Float64Array

    @classmethod
    def of(
        cls,
        costs: CostTable,
        exits: tuple[int, ...],
        rows: float = 1,
        *,
        fills: bool = True,
        adapters: Sequence[int] = (),
    ) -> TokenCosts:
        """Share the cost of a launch among its rows.

        Args:
            costs: Measured prices, under the probe that is asked.
            exits: Layers that were recorded.
            rows: Rows in the launch.
            fills: Whether the keys and values of skipped layers are projected, and paid for.
            adapters: Exits with an adapter layer, which every token that comes there runs at the
                price of a layer.

        Raises:
            ConfigError: that many rows were not measured.
        """
        prices, alone = costs.at(rows), costs.at(1)
        units = units_of(prices)
        share_O = np.array([1 / (prices.rows * full_of(alone, unit)) for unit in units])
        parts = {
            part: share_O * [getattr(prices, f"{part}_{unit}") for unit in units] for part in PARTS
        }
        layers_E1 = np.array([*exits, costs.layers], np.float64)
        adapted_E1 = (np.asarray(adapters)[:, None] <= layers_E1).sum(0) if adapters else 0
        leave_OE1 = np.outer(parts["layer"], layers_E1 + adapted_E1)
        if fills:
            leave_OE1 += np.outer(parts["fill"], costs.layers - layers_E1)
        leave_OE1 += (parts["step"] + parts["head"])[:, None]
        return cls(
            leave_OP=np.concatenate([np.zeros((len(units), 1)), leave_OE1], axis=1),
            probe_O=parts["probe"],
            policy_O=parts["policy"],
            build_O=parts["build"],
        )

    @classmethod
    def under(
        cls,
        schema: FeatureSchema | None,
        costs: CostTable,
        exits: tuple[int, ...],
        adapters: Sequence[int] = (),
    ) -> TokenCosts:
        """Charge the probe of the schema that a policy reads; None reads none.

        A schema whose probe was not measured is priced as the table's own; but SOFTMAX_V2, which
        computes the full LM head, as a head at least. A row that leaves after a SOFTMAX_V2 probe
        pays no head of its own: its token comes from the one that the probe computed.
        """
        probed = _probed_by(schema, costs)
        found = cls.of(probed, exits, adapters=adapters)
        if schema != SOFTMAX_V2:
            return found
        leave_OP = found.leave_OP.copy()
        alone = probed.at(1)  # whose probe may lack the joules that the table's own has
        for row, unit in enumerate(units_of(alone)):
            leave_OP[row, 1:-1] -= getattr(alone, f"head_{unit}") / full_of(alone, unit)
        return replace(found, leave_OP=leave_OP)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Entries of a reward vector, in order; energy only if its costs are known."""
        return ("quality", "latency", "energy")[: 1 + len(self.probe_O)]

    @property
    def leave_E1(self) -> Float64Array:
        """Latency of leaving at each exit and at full depth, never asked, [E1]."""
        return self.leave_OP[LATENCY, 1:]

    @property
    def asked_everywhere_E1(self) -> Float64Array:
        """Latency of leaving at each exit and at full depth, asked at all exits before, [E1]."""
        exits = len(self.leave_E1) - 1
        return self.price(np.arange(exits + 1), np.minimum(np.arange(1, exits + 2), exits))

    def price(
        self, taken_N: ArrayLike, asked_N: ArrayLike, *, asks_first: bool = False
    ) -> Float64Array:
        """Latency of each token, [N].

        Args:
            taken_N: Index of the exit where each left; E for full depth.
            asked_N: Exits at which each was asked.
            asks_first: Whether each was also asked before the first layer, without a probe.
        """
        asked = np.asarray(asked_N)
        decide, build = self.probe_O[LATENCY] + self.policy_O[LATENCY], self.build_O[LATENCY]
        paid_N = self.leave_E1[np.asarray(taken_N)] + asked * decide + (asked > 0) * build
        return np.asarray(paid_N + self.policy_O[LATENCY] if asks_first else paid_N, np.float64)


def units_of(prices: Prices) -> tuple[Unit, ...]:
    """Name the units that are known: seconds, and joules if every part's are known."""
    knows_energy = all(getattr(prices, f"{part}_j") is not None for part in PARTS)
    return ("s", "j") if knows_energy else ("s",)


def full_of(prices: Prices, unit: Unit) -> float:
    """Price a launch at full depth, in seconds or joules; ask for joules only if they are known."""
    full = prices.full_s if unit == "s" else prices.full_j
    assert full is not None
    return full


def costs_for(costs: CostTable, model: str, layers: int, schema: str) -> CostTable:
    """Take the costs of a model under the probe of a schema (its name).

    Raises:
        ConfigError: they are of another model, or hold no such probe. A table of constants fits
            any schema, and any model of as many layers.
    """
    require_costs_of(costs, model, layers)
    if costs.schema in ("", schema):
        return costs
    return costs.with_probe(schema)


def require_costs_of(costs: CostTable, model: str, layers: int) -> None:
    """Refuse the costs of another model.

    Raises:
        ConfigError: they are of another, or of one with another number of layers.
    """
    if costs.layers != layers:
        raise ConfigError(
            "costs",
            f"are of a model with {costs.layers} layers, not of one with {layers}",
            "Measure the model that was recorded",
        )
    costs.require_model(model)


def _probed_by(schema: FeatureSchema | None, costs: CostTable) -> CostTable:
    if schema is None:
        return costs.scaled("probe", 0.0).scaled("build", 0.0)
    if schema.name in costs.probes:
        return costs.with_probe(schema.name)
    if schema == SOFTMAX_V2 and 0 < costs.probe_s < costs.head_s:
        return costs.scaled("probe", costs.head_s / costs.probe_s)
    return costs
