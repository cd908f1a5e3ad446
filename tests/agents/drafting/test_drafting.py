"""Training, export, replay and choice of drafting policies.

Shape suffixes: N tokens, E exits, D observation columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offramp.agents.drafting.draft_chances import fit_chances
from offramp.agents.drafting.draft_net import router_of
from offramp.agents.drafting.draft_ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.draft_replay import as_read, at_exits, replay_decisions, replay_drafts
from offramp.controller.errors import ConfigError
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.drafts import ConfidentDraft, StaticDraft, ThompsonDraft
from offramp.controller.policies.exits import Exit
from offramp.envs import DraftExitCore, TokenTraces
from offramp.envs.cores.draft_tables import CandidateDrafts
from offramp.research.draft_rules import (
    del_rule,
    halfway_confidence,
    hindsight,
    loads_of,
    static_grid,
)
from support.cost_tables import measured
from support.slow_drafting import drafted_traces


@pytest.fixture(scope="module")
def traces() -> TokenTraces:
    return drafted_traces(documents=8, tokens=40)


def all_right(traces: TokenTraces) -> TokenTraces:
    return replace(traces, agree_NE=np.ones_like(traces.agree_NE))


@pytest.mark.parametrize("headless", [False, True])
def test_the_exported_router_decides_as_sb3_does(traces: TokenTraces, headless: bool) -> None:
    table_VK = np.zeros((4, 4), np.int32) if headless else None
    if headless:
        traces = CandidateDrafts(**{name: getattr(traces, name) for name in traces.__slots__})
    config = DraftPPOConfig(steps=2_000, envs=16, rollout=32, batch=256, hidden=(16,), imitated=512)
    fitted = fit_chances(traces)
    model = train_drafter(traces, measured(), fitted, config, candidates_VK=table_VK)
    router = router_of(model, fitted.chances, traces.header.exits, 8, table_VK)
    core = DraftExitCore(traces, measured(), num_envs=32, odds=fitted.odds_NE)
    obs_BD, rng = core.reset(0), np.random.default_rng(0)
    for _ in range(40):
        best_B = model.predict(obs_BD, deterministic=True)[0]
        parts = np.split(obs_BD, [SOFTMAX_V2.width, -1], axis=1)[:2]
        start_BA = router.starter.rows(parts[1]).copy()
        route_BA = router.router.rows(as_read(router, parts[0]), parts[1]).copy()
        logits_BA = np.where(obs_BD[:, -1:] == 0, start_BA, route_BA)
        here_B = np.rint(obs_BD[:, -1] * 3).astype(np.int64) - 1
        reach_BA = np.maximum(here_B, 0)[:, None] + np.arange(4)
        logits_BA[(reach_BA > 3) & (np.arange(4) < 3)] = -np.inf  # jumps past the end
        np.testing.assert_array_equal(logits_BA.argmax(1), best_B)
        obs_BD = core.step(rng.integers(4, size=32)).obs_BD


def test_training_begins_where_drafting_pays_and_stays_there(traces: TokenTraces) -> None:
    rates: list[float] = []
    config = DraftPPOConfig(steps=8_000, envs=64, rollout=16, batch=512, imitated=512)
    shown = all_right(traces)
    fitted = fit_chances(shown)
    train_drafter(shown, measured(), fitted, config, lambda _, rate: rates.append(rate))
    # Every draft is right, so that drafting wins by far; never to draft would earn 1.
    assert min(rates) > 1.3


def test_dels_loads_are_those_of_the_cost_table(traces: TokenTraces) -> None:
    header = replace(traces.header, exits=(Exit(6, "int4"), Exit(12, "int4"), 3, 6), adapters=(3,))
    # A layer of the copy costs 0.4 of the model's own there; exit 3's adapter layer is one more.
    assert loads_of(header, measured()) == pytest.approx([6 * 0.4, 12 * 0.4, 4, 7])
    with pytest.raises(ConfigError, match="do not hold those of a copy in int8"):
        loads_of(replace(header, exits=(Exit(6, "int8"),)), measured())


def test_the_same_seed_trains_the_same_net(traces: TokenTraces) -> None:
    config = DraftPPOConfig(steps=1_000, envs=16, rollout=16, batch=64, imitated=256)
    fitted = fit_chances(traces)
    first, second = (
        router_of(train_drafter(traces, measured(), fitted, config), fitted.chances, (2, 4, 7), 8)
        for _ in range(2)
    )
    for mine, other in zip(first.router.weights, second.router.weights, strict=True):
        np.testing.assert_array_equal(mine[0], other[0])


def test_right_drafts_pay_as_by_hand(traces: TokenTraces) -> None:
    costs, drafts = measured().with_probe("softmax"), 4
    long = all_right(drafted_traces(documents=1, tokens=50))
    found = replay_drafts(StaticDraft(layer=2, length=drafts), long, costs)
    one = costs.at(1)
    # A cycle: five starts, four drafts, and layers 2 to 11 over all five tokens.
    draft_s = 2 * one.layer_s + one.head_s + one.policy_s + one.build_s + one.step_s
    passed = costs.launch(5)
    deep_s = 2 * one.layer_s + 10 * passed.layer_s + passed.head_s + passed.step_s
    cycle_s = drafts * draft_s + deep_s + (drafts + 1) * one.policy_s
    forced_s = one.policy_s  # the document's last token is not asked where it may draft
    assert found.counts["cycles"] == 10
    assert found.seconds == pytest.approx(10 * cycle_s - forced_s)


def test_an_exit_asked_alone_is_one_that_was_recorded_alone(traces: TokenTraces) -> None:
    policy = ConfidentDraft(layer=4, threshold=0.5)
    whole = replay_drafts(policy, traces, measured())
    alone = replay_drafts(policy, at_exits(traces, (4,)), measured())
    assert whole == alone
    with pytest.raises(ConfigError, match="exits"):
        at_exits(traces, (3,))


def test_learners_are_told_and_the_original_is_not_changed(traces: TokenTraces) -> None:
    policy = ThompsonDraft(7, seed=3)
    first, second = (replay_drafts(policy, traces, measured()) for _ in range(2))
    assert first == second
    assert (policy.alpha, policy.beta) == (1.0, 1.0)
    assert first.counts["drafts"] > 0


def test_nobody_beats_hindsight(traces: TokenTraces) -> None:
    bound = hindsight(traces, measured())
    grid = static_grid(traces, measured())
    assert grid[0].offline.rate >= grid[-1].offline.rate
    assert bound > grid[0].offline.rate
    assert bound > del_rule(traces, traces, measured())[0].offline.rate


def test_verifying_every_token_is_full_depth(traces: TokenTraces) -> None:
    free = measured().with_probe("softmax").scaled("policy", 0.0)
    found = replay_decisions(lambda obs_ND: np.full(len(obs_ND), 3), traces, free)
    assert found.rate == pytest.approx(1)


def test_halfway_is_between_right_and_wrong(traces: TokenTraces) -> None:
    right_N = traces.agree_NE[:, 0] > 0
    top1_N = traces.softmax_NES[:, 0, 0]
    expected = (top1_N[right_N].mean() + top1_N[~right_N].mean()) / 2
    assert halfway_confidence(traces)[0] == pytest.approx(expected, rel=1e-5)


def test_an_ask_without_the_head_costs_a_candidate_probe(traces: TokenTraces) -> None:
    mine = CandidateDrafts(**{name: getattr(traces, name) for name in traces.__slots__})
    costs = measured()
    asked, head = (DraftExitCore(each, costs, num_envs=1).prices for each in (mine, traces))
    one, whole = costs.at(1), costs.with_probe("softmax").at(1)
    assert asked.ask_s == one.probe_s + one.policy_s < head.ask_s == whole.probe_s + whole.policy_s
    with pytest.raises(ConfigError, match=r"^traces: "):
        replay_drafts(StaticDraft(layer=2, length=2), mine, costs)
