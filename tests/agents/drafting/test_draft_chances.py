"""Calibration of drafts, the stop by trust, and where PPO starts.

Shape suffixes: N tokens, E exits, S softmax columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offramp.agents.drafting.draft_chances import fit_chances, logistic_line, odds_of, trusted_grid
from offramp.agents.drafting.draft_net import router_of
from offramp.agents.drafting.draft_ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.draft_replay import replay_drafts
from offramp.controller.errors import TraceError
from offramp.controller.features import FloatArray
from offramp.envs import TokenTraces
from offramp.research.draft_rules import hindsight, static_grid
from support.cost_tables import measured
from support.slow_drafting import drafted_traces


def telling(documents: int = 8, tokens: int = 40, seed: int = 0) -> TokenTraces:
    """Tokens whose exits are right the likelier, the longer the lead of the best logit is."""
    traces = drafted_traces(documents, tokens, exits=(2,), seed=seed)
    rng = np.random.default_rng(seed)
    lead_NE = rng.exponential(1.0, traces.agree_NE.shape)
    right_NE = rng.random(lead_NE.shape) < 1 / (1 + np.exp(-0.5 - 6 * lead_NE))
    top1_NE = 1 / (1 + np.exp(-lead_NE))
    softmax_NES = np.stack([top1_NE, 2 * top1_NE - 1, np.zeros_like(top1_NE)], axis=-1)
    return replace(
        traces, agree_NE=right_NE.astype(np.float32), softmax_NES=softmax_NES.astype(np.float32)
    )


def test_the_fit_finds_the_line_that_made_the_drafts() -> None:
    line_E2 = fit_chances(telling(documents=60, tokens=200)).chances.line_E2
    np.testing.assert_allclose(line_E2, [(0.5, 6.0)], atol=0.6)


def test_where_all_drafts_are_right_the_line_is_finite() -> None:
    line_2 = logistic_line(np.linspace(0, 8, 50, dtype=np.float32), np.ones(50, np.bool_))
    assert np.isfinite(line_2).all()
    assert 1 / (1 + np.exp(-line_2[0])) > 0.5


def test_stopping_by_trust_earns_more_than_any_fixed_number() -> None:
    learning, held_out = telling(seed=0), telling(seed=1)
    costs = measured()
    found = trusted_grid(fit_chances(learning).chances, held_out, costs)
    static = static_grid(held_out, costs)[0]
    assert static.offline.rate * 1.03 < found[0].offline.rate <= hindsight(held_out, costs)


def test_ppo_starts_from_the_stop_by_trust() -> None:
    learning, costs = telling(), measured()
    fitted = fit_chances(learning)
    rule = trusted_grid(fitted.chances, learning, costs)[0]
    # One decision in each episode: nothing is learned yet.
    config = DraftPPOConfig(steps=1, envs=64, rollout=1, batch=64, imitated=4_096)
    model = train_drafter(learning, costs, fitted, config)
    router = router_of(model, fitted.chances, (2,), 8)
    assert (
        replay_drafts(router, learning, costs, odds_NE=fitted.odds_NE).rate
        > 0.97 * rule.offline.rate
    )


def test_what_the_state_tells_is_learned_and_judged_on_other_documents() -> None:
    traces = telling(documents=30, tokens=60)
    rng = np.random.default_rng(3)
    state_NED = rng.standard_normal((len(traces), 1, 12)).astype(np.float16)
    # Nine times of ten the exit is right where the state says so, whatever its lead is.
    right_NE = ((state_NED[:, :, 0] > 0) ^ (rng.random((len(traces), 1)) < 0.1)).astype(np.float32)
    shown = replace(
        traces, agree_NE=right_NE, state_NED=state_NED, read_N=np.full(len(traces), -1, np.int32)
    )
    kinds = np.zeros(4, np.uint8)
    by_lead, whole = fit_chances(shown), fit_chances(shown, kinds)
    assert by_lead.chances.insight is None
    assert log_loss(whole.odds_NE, right_NE) < 0.7 * log_loss(by_lead.odds_NE, right_NE)
    in_sample_NE = odds_of(whole.chances, shown)
    # What is shown in training was learned without the document; what policies carry, with it.
    assert not np.allclose(whole.odds_NE, in_sample_NE)
    with pytest.raises(TraceError, match="no states"):
        odds_of(whole.chances, traces)


def log_loss(odds_NE: FloatArray, right_NE: FloatArray) -> float:
    return float(
        np.mean(np.logaddexp(0, -odds_NE) * right_NE + np.logaddexp(0, odds_NE) * (1 - right_NE))
    )
