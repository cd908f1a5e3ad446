"""Offline replay: which exit a policy would take on recorded tokens.

Shape suffixes: N tokens, E exits, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V1, FloatArray
from offramp.controller.policy import ExitPolicy
from offramp.envs.tokens import TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a policy would have done.

    Attributes:
        agreement: Share of tokens equal to the full-depth token.
        mean_layers: Mean layers executed.
        cost: Mean cost in units of a full-depth token's time.
    """

    agreement: float
    mean_layers: float
    cost: float


def replay(policy: ExitPolicy, traces: TokenTraces, costs: CostTable) -> Replay:
    """Walk every recorded token through a policy.

    Offline numbers are optimistic: the cache the traces were recorded with is exact. Use them to
    place operating points, never to report one.

    Raises:
        ConfigError: the policy asks at a layer that was not recorded.
    """
    exit_N = exits_taken(policy, traces)
    column_N = np.minimum(exit_N, len(traces.header.exits))
    rows_N = np.arange(len(traces))
    full_N = np.ones((len(traces), 1), np.float32)
    agree_NE1 = np.concatenate([traces.agree_NE, full_N], axis=1)
    layer_E1 = np.asarray([*traces.header.exits, traces.header.layers])
    return Replay(
        agreement=float(agree_NE1[rows_N, column_N].mean()),
        mean_layers=float(layer_E1[column_N].mean()),
        cost=float(costs.leaving(traces.header.exits)[column_N].mean()),
    )


def exits_taken(policy: ExitPolicy, traces: TokenTraces) -> NDArray[np.int64]:
    """Index of the exit each token leaves at, E for full depth; [N].

    Raises:
        ConfigError: the policy asks at a layer that was not recorded.
    """
    exits = traces.header.exits
    missing = set(policy.exits) - set(exits)
    if missing:
        raise ConfigError("exits", f"{sorted(missing)} were not recorded", f"Recorded: {exits}")
    taken_N = np.full(len(traces), len(exits))
    for index in reversed([exits.index(layer) for layer in policy.exits]):
        taken_N[policy.leave(_features(policy, traces, index))] = index
    return taken_N


def _features(policy: ExitPolicy, traces: TokenTraces, exit_index: int) -> FloatArray:
    if policy.schema is None:
        return np.empty((len(traces), 0), np.float32)
    if policy.schema == CANDIDATES_V1:
        return np.ascontiguousarray(traces.features_NEF[:, exit_index])
    assert policy.schema == SOFTMAX_V1
    # Traces hold the margin; no replayed policy reads the other column.
    margin_N = traces.margin_NE[:, exit_index]
    return np.stack([np.zeros_like(margin_N), margin_N], axis=1)
