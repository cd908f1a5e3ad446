"""Measured costs as an environment charges them: one row's share, in units of one full-depth token.

Shape suffixes: O objectives that cost (latency; energy if known), E1 = exits and full depth,
P = E + 2 places on the way: before the first layer, E exits, full depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs.prices import PARTS, Prices
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError

Float64Array = NDArray[np.float64]
Unit = Literal["s", "j"]

LATENCY, ENERGY = 0, 1
"""Rows of a tariff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """What one token's parts cost, as shares of a full-depth token's seconds and joules.

    Attributes:
        leave_OP: Coming to each place and leaving there, without any decision:
            step + e·layer + (L − e)·fill + head; 0 before the first layer.
        probe_O: One probe.
        policy_O: One decision.
        build_O: Preparing a token's probes: paid with the first.
    """

    leave_OP: Float64Array
    probe_O: Float64Array
    policy_O: Float64Array
    build_O: Float64Array

    @classmethod
    def of(
        cls, costs: CostTable, exits: tuple[int, ...], rows: float = 1, *, fills: bool = True
    ) -> Tariff:
        """One row's share of a launch of that many rows; the unit is a token decoded alone.

        Args:
            costs: Measured.
            exits: Layers that were recorded.
            rows: In the launch.
            fills: Whether the keys and values of skipped layers are projected, and paid for.

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
        leave_OE1 = np.outer(parts["layer"], layers_E1)
        if fills:
            leave_OE1 += np.outer(parts["fill"], costs.layers - layers_E1)
        leave_OE1 += (parts["step"] + parts["head"])[:, None]
        return cls(
            leave_OP=np.concatenate([np.zeros((len(units), 1)), leave_OE1], axis=1),
            probe_O=parts["probe"],
            policy_O=parts["policy"],
            build_O=parts["build"],
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Entries of a reward vector, in order; energy only if its costs are known."""
        return ("quality", "latency", "energy")[: 1 + len(self.probe_O)]


def units_of(prices: Prices) -> tuple[Unit, ...]:
    """Seconds, and joules if every part's are known."""
    knows_energy = all(getattr(prices, f"{part}_j") is not None for part in PARTS)
    return ("s", "j") if knows_energy else ("s",)


def full_of(prices: Prices, unit: Unit) -> float:
    """Seconds or joules of a launch at full depth; asked for joules only where they are known."""
    full = prices.full_s if unit == "s" else prices.full_j
    assert full is not None
    return full


def costs_for(costs: CostTable, model: str, layers: int, schema: str) -> CostTable:
    """The costs of a model under the probe of a schema (its name).

    Raises:
        ConfigError: they are of another model, or hold no such probe. A table of constants fits
            any schema, and any model of as many layers.
    """
    if costs.layers != layers:
        raise ConfigError(
            "costs",
            f"are of a model with {costs.layers} layers, not of one with {layers}",
            "Measure the model that was recorded",
        )
    costs.require_model(model)
    if costs.schema in ("", schema):
        return costs
    return costs.with_probe(schema)
