"""Measured costs as an environment charges them: in units of one full-depth token, by objective.

Shape suffixes: O objectives that cost (latency; energy if known), P = E + 2 places on the way:
before the first layer, E exits, full depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.traces import TraceHeader

Float64Array = NDArray[np.float64]

LATENCY, ENERGY = 0, 1
"""Rows of a tariff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """What one token's parts cost, as shares of a full-depth token's seconds and joules.

    Attributes:
        leave_OP: Coming to each place and leaving there, without any decision: embedding, layers,
            fill of the skipped ones, head; 0 before the first layer.
        probe_O: One probe.
        policy_O: One decision.
    """

    leave_OP: Float64Array
    probe_O: Float64Array
    policy_O: Float64Array

    @classmethod
    def of(cls, costs: CostTable, exits: tuple[int, ...]) -> Tariff:
        """At batch 1: step + e·layer + (L − e)·fill + head, over the full depth's sum."""
        latency_P = _leaving(costs, exits) / costs.full_s
        return cls(
            leave_OP=latency_P[None],
            probe_O=np.array([costs.probe_s / costs.full_s]),
            policy_O=np.array([costs.policy_s / costs.full_s]),
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Entries of a reward vector, in order; energy only if its costs are known."""
        return ("quality", "latency", "energy")[: 1 + len(self.probe_O)]


def _leaving(costs: CostTable, exits: tuple[int, ...]) -> Float64Array:
    layers_E1 = np.array([*exits, costs.layers], np.float64)
    skipped_E1 = costs.layers - layers_E1
    seconds_E1 = layers_E1 * costs.layer_s + skipped_E1 * costs.fill_s
    return np.append(0.0, seconds_E1 + costs.step_s + costs.head_s)


def require_same_model(costs: CostTable, header: TraceHeader) -> None:
    """Costs and traces must be of one model.

    Raises:
        ConfigError: they are not.
    """
    if costs.layers != header.layers:
        raise ConfigError(
            "costs",
            f"are of a model with {costs.layers} layers, the traces of {header.layers}",
            "Measure the model that was recorded",
        )
