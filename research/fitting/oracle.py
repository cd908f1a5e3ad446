"""The hindsight oracle: where to leave if full depth's token were known beforehand.

No policy can do this: it needs the labels. It bounds what any rule could save, and is reported
apart from the rules. ``plan_of`` makes it run on-policy on one document whose labels are given.

Shape suffixes: N tokens, E exits.
"""

from __future__ import annotations

import numpy as np

from offramp.agents.placing.pricing import places
from offramp.agents.placing.replay import TakenExits
from offramp.controller.costs.table import CostTable
from offramp.controller.policies.protocols import IndexArray
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.exit_plan import PlannedExit


def oracle(traces: TokenTraces, costs: CostTable, trade_off: float = 0.0) -> TakenExits:
    """The best place to leave for each token, at no probe.

    Args:
        traces: Tokens with their labels.
        costs: Measured costs; its probes and decisions are not charged.
        trade_off: λ. At 0 the cheapest place that agrees with full depth; else the one with the
            largest agreement − λ · cost.
    """
    if trade_off > 0:
        cost_E1 = places(None, traces.header.exits, costs)
        taken_N = np.argmax(traces.quality("agreement") - trade_off * cost_E1, axis=1)
    else:
        taken_N = first_agreeing(traces)
    return TakenExits(taken_N=taken_N, probes_N=np.zeros(len(traces), np.int64))


def first_agreeing(traces: TokenTraces) -> IndexArray:
    """Index of the first exit whose token is full depth's; E where none is, [N]."""
    return np.asarray(np.argmax(traces.quality("agreement") > 0, axis=1))


def plan_of(traces: TokenTraces, prompt_tokens: int = 1) -> PlannedExit:
    """The oracle of one document's tokens as a policy: its n-th token leaves where planned.

    Args:
        traces: Tokens of one document, in order, from its first.
        prompt_tokens: Tokens read as a prompt; the last one's row gives step 0.
    """
    plan_T = first_agreeing(traces)[prompt_tokens - 1 :]
    return PlannedExit(exits=traces.header.exits, plan_T=plan_T)
