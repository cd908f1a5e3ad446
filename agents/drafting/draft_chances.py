"""Calibrates how likely drafts are right, and places the rule that stops by it.

Shape suffixes: N tokens, E exits, V vocabulary, K candidates; 2 the intercept and the slope of a
line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.agents.drafting.draft_replay import Chosen, ranked
from offramp.agents.drafting.insight_fit import fit_insight, more_of
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import TraceError
from offramp.controller.features import MAX_PENDING, FloatArray, IntArray
from offramp.controller.policies.drafts import TrustedDraft
from offramp.controller.policies.drafts.draft_trust import DraftChances, clipped
from offramp.controller.policies.drafts.leads import leads_of
from offramp.envs.traces.tokens import TokenTraces

RIDGE = 0.1
"""Weight of the squared slope and intercept: where all drafts are right, both stay finite."""

NEWTON_STEPS = 50
"""Steps of the fit; it moves no more after some ten."""

TRUSTS = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Thresholds of trust tried."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedChances:
    """How likely drafts are right, and what was held of those that it was fitted to.

    Attributes:
        chances: What policies carry.
        odds_NE: Log-odds of the tokens it was fitted to. What insight adds to each was learned on
            other documents, so that an agent is not shown what is known by heart.
    """

    chances: DraftChances
    odds_NE: FloatArray

    def part(self, exits: Sequence[int]) -> FittedChances:
        """The same of some of the exits, which are named by their layers."""
        places = [self.chances.exits.index(layer) for layer in exits]
        return FittedChances(chances=self.chances.part(exits), odds_NE=self.odds_NE[:, places])


def fit_chances(traces: TokenTraces, kinds: NDArray[np.uint8] | None = None) -> FittedChances:
    """Fit, for each exit, the chance that its token is full depth's.

    Args:
        traces: Recorded tokens.
        kinds: The kind of each token (``token_kinds``): with it, and with states, what these tell
            is learned, too. None goes by the lead of the logit alone.
    """
    top1_NE, margin_NE = traces.softmax_NES[:, :, 0], traces.softmax_NES[:, :, 1]
    right_NE = traces.agree_NE > 0
    exits = traces.header.exits
    lines = [
        logistic_line(leads_of(top1_NE[:, e], margin_NE[:, e]), right_NE[:, e])
        for e in range(len(exits))
    ]
    by_lead = DraftChances(np.stack(lines), exits)
    base_NE = odds_of(by_lead, traces)
    if kinds is None or traces.state_NED is None:
        return FittedChances(chances=by_lead, odds_NE=base_NE)
    insight, more_NE = fit_insight(traces, base_NE, kinds)
    chances = DraftChances(by_lead.line_E2, exits, insight)
    return FittedChances(chances=chances, odds_NE=clipped(base_NE + more_NE))


def odds_of(chances: DraftChances, traces: TokenTraces) -> FloatArray:
    """Log-odds of recorded tokens as a policy will hold them, [N, E].

    Raises:
        TraceError: there is insight to be used, and no states were recorded.
    """
    sure_NES, exits = traces.softmax_NES, range(len(traces.header.exits))
    odds_NE = np.stack([chances.odds(e, sure_NES[:, e]) for e in exits], axis=1)
    if chances.insight is None:
        return odds_NE
    if traces.state_NED is None or traces.read_N is None:
        raise TraceError("traces", "hold no states, which insight reads", "Record them, too")
    return clipped(odds_NE + more_of(chances.insight, traces))


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
    odds_NE: FloatArray | None = None,
) -> list[Chosen]:
    """Every (exit, threshold of trust), the best first; headless if a table is given.

    Args:
        chances: How likely drafts of the traces' exits are right.
        validation: Tokens to replay.
        costs: What a token's parts cost, as measured.
        candidates_VK: Candidate table, if any.
        max_pending: Drafts that may be open.
        odds_NE: Log-odds of the tokens; None: as the chances give them.
    """
    name = "trust stop" if candidates_VK is None else "headless trust stop"
    insights = [chances.part((layer,)).insight for layer in chances.exits]
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
                insight=insights[index],
            ),
        )
        for index, layer in enumerate(validation.header.exits)
        for threshold in TRUSTS
    ]
    odds_NE = odds_of(chances, validation) if odds_NE is None else odds_NE
    return ranked(tried, validation, costs, max_pending, odds_NE)
