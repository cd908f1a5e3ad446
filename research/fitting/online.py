"""Where the rules that learn while serving start from: what training traces know already.

Shape suffixes: N tokens, E exits, A arms, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.agents.placing.replay import replay
from offramp.controller.costs.table import CostTable
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.protocols import ThresholdPolicy
from offramp.controller.policies.rules.bandit import ThresholdBandit
from offramp.controller.policies.rules.beta import BetaThreshold, moments_of
from offramp.controller.traces import SOFTMAX_COLUMNS
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import TokenTraces

KNOWN = 200.0
"""Tokens that the training traces count for, per class: served ones soon outweigh them."""

KNOWN_PULLS = 5.0
"""Pulls that the training traces count for, per arm."""


def fit_beta(traces: TokenTraces, layer: int, zeta: float, column: str = "top1") -> BetaThreshold:
    """FREE's rule at one exit, its two distributions started from training tokens.

    Args:
        traces: Tokens of the training split.
        layer: The shallow exit; must have been recorded.
        zeta: ζ, the posterior of agreeing above which a token leaves.
        column: Confidence, one of SOFTMAX_COLUMNS without ``entropy``.
    """
    exit_index = traces.header.exits.index(layer)
    confidence_N = traces.softmax_NES[:, exit_index, SOFTMAX_COLUMNS.index(column)]
    moments_23 = moments_of(confidence_N, traces.agree_NE[:, exit_index] > 0)
    known = np.minimum(1.0, KNOWN / np.maximum(moments_23[:, :1], 1.0))
    return BetaThreshold(
        exits=(layer,), schema=SOFTMAX_V2, column=column, zeta=zeta, moments_23=moments_23 * known
    )


def fit_bandit(
    traces: TokenTraces,
    costs: CostTable,
    trade_off: float,
    thresholds: Sequence[float],
    column: str = "margin",
) -> ThresholdBandit:
    """A bandit over thresholds, each arm started with its mean reward on training tokens.

    Args:
        traces: Tokens of the training split.
        costs: Measured costs, probes included.
        trade_off: λ of the reward, agreement − λ · cost.
        thresholds: Thresholds that the bandit chooses among, its arms.
        column: Confidence compared, of SOFTMAX_V2.
    """
    exits = traces.header.exits
    means = [_mean_reward(traces, costs, trade_off, each, column) for each in thresholds]
    counts_A = np.full(len(thresholds), KNOWN_PULLS)
    return ThresholdBandit(
        exits=exits,
        schema=SOFTMAX_V2,
        column=column,
        thresholds=tuple(float(each) for each in thresholds),
        trade_off=trade_off,
        costs=tuple(
            TokenCosts.under(
                SOFTMAX_V2, costs, exits, traces.header.adapters
            ).asked_everywhere_E1.tolist()
        ),
        counts_A=counts_A,
        sums_A=counts_A * np.asarray(means),
    )


def _mean_reward(
    traces: TokenTraces, costs: CostTable, trade_off: float, threshold: float, column: str
) -> float:
    policy = ThresholdPolicy(traces.header.exits, SOFTMAX_V2, column, threshold)
    replayed = replay(policy, traces, costs)
    return replayed.agreement - trade_off * replayed.cost
