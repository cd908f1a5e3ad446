"""Backward induction: fit, from the last exit to the first, what leaving gains over going on.

Shape suffixes: N tokens, E exits, F features, P terms of the polynomial.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.agents.learning.export import Normaliser
from offramp.controller.costs.table import CostTable
from offramp.controller.features import SCHEMAS, IntArray
from offramp.controller.policies.rules.optimal_stopping import StoppingPolicy, terms
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import Quality, TokenTraces

RIDGE = 1.0
"""Penalty on squared coefficients, per token: one token's worth of shrinkage."""


def fit_stopping(
    traces: TokenTraces,
    costs: CostTable,
    trade_off: float,
    *,
    quality: Quality = "agreement",
    candidates_VK: IntArray | None = None,
) -> StoppingPolicy:
    """The stopping rule for return = quality − λ · cost, by regression.

    At the last exit the return of going on is that of full depth, at each earlier one that of
    following the rule already fitted behind it (Longstaff and Schwartz 2001, section 2: realised
    returns, not fitted ones, are carried back). The regression's target is the difference between
    leaving here and that return.

    Args:
        traces: Tokens of the training split.
        costs: Measured costs, probes included.
        trade_off: λ, the price of a unit of cost in units of quality.
        quality: Name of the score of an exit's token.
        candidates_VK: For the policy's probe.
    """
    schema = SCHEMAS[traces.header.schema]
    normaliser = Normaliser.fit(traces.features_NEF.reshape(-1, schema.width))
    return_NE = returns(traces, costs, trade_off, quality)
    onwards_N = return_NE[:, -1]
    weights = []
    for exit_index in reversed(range(len(traces.header.exits))):
        features_NF = traces.features_NEF[:, exit_index]
        terms_NP = terms(features_NF, normaliser.mean_F, normaliser.std_F).astype(np.float64)
        here_N = return_NE[:, exit_index]
        weight_P = _ridge(terms_NP, here_N - onwards_N)
        weights.append(weight_P)
        onwards_N = np.where(terms_NP @ weight_P > 0, here_N, onwards_N)
    return StoppingPolicy(
        exits=traces.header.exits,
        schema=schema,
        mean_F=normaliser.mean_F,
        std_F=normaliser.std_F,
        weights_EP=np.stack(weights[::-1]).astype(np.float32),
        candidates_VK=candidates_VK,
    )


def returns(
    traces: TokenTraces, costs: CostTable, trade_off: float, quality: Quality
) -> NDArray[np.float64]:
    """Quality − λ · cost of leaving at each exit, and of full depth, [N, E + 1]."""
    schema = SCHEMAS[traces.header.schema]
    cost_E1 = TokenCosts.under(
        schema, costs, traces.header.exits, traces.header.adapters
    ).asked_everywhere_E1
    return traces.quality(quality).astype(np.float64) - trade_off * cost_E1


def _ridge(terms_NP: NDArray[np.float64], target_N: NDArray[np.float64]) -> NDArray[np.float64]:
    gram_PP = terms_NP.T @ terms_NP
    gram_PP[np.diag_indices_from(gram_PP)] += RIDGE
    return np.asarray(np.linalg.solve(gram_PP, terms_NP.T @ target_N))
