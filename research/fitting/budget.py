"""EERO-like: how many tokens leave at each exit under a budget, and the thresholds that do it.

Shape suffixes: N tokens, E exits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.rules.kept_stages import KeptStages
from offramp.controller.policies.rules.stages import NEVER, StageThresholds
from offramp.controller.traces import SOFTMAX_COLUMNS
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import Quality, TokenTraces

SHARPNESS = 50.0
"""β: weights fall by e for every 1/50 of risk."""

LARGEST_PRICE = 1e6
"""Beyond this price of cost the cheapest exit takes everything."""

LEVELS = 129
"""Quantiles of the score that a kept budget's thresholds move along."""

NONE_Q = np.zeros(LEVELS)
"""Those of an exit that no token reached."""


def fit_budget(
    traces: TokenTraces,
    costs: CostTable,
    budget: float,
    column: str = "top1",
    quality: Quality = "agreement",
) -> StageThresholds:
    """Shares by exponential weights under a budget, then one quantile per exit.

    Valade, Hebiri and Gay 2024 (EERO, arXiv 2402.03779): exits are classifiers with a reject
    option, and the probabilities of leaving at each come from aggregation with exponential
    weights of their risks under the budget. A share of the tokens that reach an exit leaves
    there: those with the highest score.

    Args:
        traces: Tokens of the training split.
        costs: Measured costs, probes included.
        budget: Mean cost allowed, in units of a full-depth token's time.
        column: Score, one of SOFTMAX_COLUMNS without ``entropy``.
        quality: Says what an exit is worth; its lack is the risk.

    Raises:
        ConfigError: leaving at the cheapest exit already costs more than the budget.
    """
    share_E1 = budget_shares(traces, costs, budget, quality)
    score_NE = traces.softmax_NES[:, :, SOFTMAX_COLUMNS.index(column)]
    return StageThresholds(
        exits=traces.header.exits,
        schema=SOFTMAX_V2,
        column=column,
        thresholds=stage_thresholds(score_NE, share_E1),
    )


def fit_kept_budget(
    traces: TokenTraces,
    costs: CostTable,
    budget: float,
    column: str = "top1",
    quality: Quality = "agreement",
) -> KeptStages:
    """The shares of ``fit_budget``, kept by thresholds that move while texts come.

    Thresholds that were fitted once let other shares leave on other texts; arguments and errors
    are those of ``fit_budget``.
    """
    share_E1 = budget_shares(traces, costs, budget, quality)
    score_NE = traces.softmax_NES[:, :, SOFTMAX_COLUMNS.index(column)]
    thresholds = stage_thresholds(score_NE, share_E1)
    here_N = np.ones(len(score_NE), np.bool_)
    shares, scores = [], []
    for exit_index, threshold in enumerate(thresholds):
        score_M = score_NE[here_N, exit_index]
        scores.append(np.quantile(score_M, np.linspace(0, 1, LEVELS)) if len(score_M) else NONE_Q)
        shares.append(float((score_M >= np.float32(threshold)).mean()) if len(score_M) else 0.0)
        here_N &= score_NE[:, exit_index] < np.float32(threshold)
    return KeptStages(
        exits=traces.header.exits,
        schema=SOFTMAX_V2,
        column=column,
        shares=tuple(shares),
        scores_EQ=np.stack(scores),
    )


def budget_shares(
    traces: TokenTraces, costs: CostTable, budget: float, quality: Quality
) -> NDArray[np.float64]:
    """Shares of the tokens that leave at each exit, and at full depth, under a budget, [E + 1].

    Raises:
        ConfigError: leaving at the cheapest exit already costs more than the budget.
    """
    risk_E1 = 1.0 - traces.quality(quality).mean(axis=0, dtype=np.float64)
    cost_E1 = TokenCosts.under(
        SOFTMAX_V2, costs, traces.header.exits, traces.header.adapters
    ).asked_everywhere_E1
    return gibbs_shares(risk_E1, cost_E1, budget)


def gibbs_shares(
    risk_E1: NDArray[np.float64],
    cost_E1: NDArray[np.float64],
    budget: float,
    sharpness: float = SHARPNESS,
) -> NDArray[np.float64]:
    """π_k ∝ exp(−β (risk_k + μ cost_k)) with the least μ ≥ 0 that keeps the budget, [E + 1].

    This is the distribution that minimises mean risk + KL(π, uniform) / β under the budget.

    Raises:
        ConfigError: no μ keeps the budget.
    """

    def shares(price: float) -> NDArray[np.float64]:
        exponent_E1 = -sharpness * (risk_E1 + price * cost_E1)
        weight_E1 = np.exp(exponent_E1 - exponent_E1.max())
        return np.asarray(weight_E1 / weight_E1.sum())

    def is_kept(price: float) -> bool:
        return float(shares(price) @ cost_E1) <= budget

    if not is_kept(LARGEST_PRICE):
        raise ConfigError(
            "budget",
            f"{budget:.3f} is below the cheapest exit's cost, {cost_E1.min():.3f}",
            "Allow more, or record a shallower exit",
        )
    low, high = 0.0, LARGEST_PRICE
    if is_kept(low):
        return shares(low)
    for _ in range(80):  # halvings: far below what a double resolves
        middle = (low + high) / 2
        low, high = (low, middle) if is_kept(middle) else (middle, high)
    return shares(high)


def stage_thresholds(score_NE: FloatArray, share_E1: NDArray[np.float64]) -> tuple[float, ...]:
    """At each exit the score that lets its share of all tokens leave there, of those that came."""
    here_N = np.ones(len(score_NE), np.bool_)
    thresholds = []
    for exit_index, share in enumerate(share_E1[:-1]):
        scores_M = np.sort(score_NE[here_N, exit_index])
        count = min(round(share * len(score_NE)), len(scores_M))
        threshold = float(scores_M[len(scores_M) - count]) if count else NEVER
        thresholds.append(threshold)
        here_N &= score_NE[:, exit_index] < np.float32(threshold)
    return tuple(thresholds)
