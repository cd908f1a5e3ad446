"""Calibrates how likely drafts are right, and places the rule that stops by it.

Shape suffixes: N tokens, E exits, V vocabulary, K candidates; 2 the intercept and the slope of a
line.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.agents.drafting.draft_replay import Chosen, ranked
from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING, FloatArray, IntArray
from offramp.controller.policies.drafts import TrustedDraft
from offramp.controller.policies.drafts.draft_trust import DraftChances, leads_of
from offramp.envs.traces.tokens import TokenTraces

RIDGE = 0.1
"""Weight of the squared slope and intercept: where all drafts are right, both stay finite."""

NEWTON_STEPS = 50
"""Steps of the fit; it moves no more after some ten."""

TRUSTS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Thresholds of trust tried."""


def fit_chances(traces: TokenTraces) -> DraftChances:
    """Fit, for each exit, the chance that its token is full depth's to the lead of its logit."""
    top1_NE, margin_NE = traces.softmax_NES[:, :, 0], traces.softmax_NES[:, :, 1]
    right_NE = traces.agree_NE > 0
    exits = traces.header.exits
    lines = [
        logistic_line(leads_of(top1_NE[:, e], margin_NE[:, e]), right_NE[:, e])
        for e in range(len(exits))
    ]
    return DraftChances(np.stack(lines), exits)


def logistic_line(x_N: FloatArray, right_N: NDArray[np.bool_]) -> FloatArray:
    """Intercept and slope of the log-odds that is likeliest, [2], by Newton's method."""
    x_N2 = np.stack([np.ones(len(x_N)), x_N.astype(np.float64)], axis=1)
    line_2 = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        chance_N = 1 / (1 + np.exp(-x_N2 @ line_2))
        slope_2 = x_N2.T @ (right_N - chance_N) - RIDGE * line_2
        curve_22 = (x_N2.T * (chance_N * (1 - chance_N))) @ x_N2 + RIDGE * np.eye(2)
        line_2 = line_2 + np.linalg.solve(curve_22, slope_2)
    return line_2.astype(np.float32)


def trusted_grid(
    chances: DraftChances,
    validation: TokenTraces,
    costs: CostTable,
    candidates_VK: IntArray | None = None,
    max_pending: int = MAX_PENDING,
) -> list[Chosen]:
    """Every (exit, threshold of trust), the best first; headless if a table is given."""
    name = "trust stop" if candidates_VK is None else "headless trust stop"
    tried = [
        (
            f"{name}, exit {layer}, θ {threshold:g}",
            TrustedDraft(
                layer,
                chances.line_E2[index],
                threshold,
                length=max_pending,
                max_pending=max_pending,
                candidates_VK=candidates_VK,
            ),
        )
        for index, layer in enumerate(validation.header.exits)
        for threshold in TRUSTS
    ]
    return ranked(tried, validation, costs, max_pending)
