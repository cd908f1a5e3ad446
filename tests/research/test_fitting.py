"""What is fitted, against closed forms and loops. Suffixes: N tokens, E exits, D width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offramp.agents.learning.export import Normaliser
from offramp.agents.learning.phat import PhatConfig, train_phat
from offramp.agents.placing.replay import mean_cost, replay, walk
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.envs.charges.token_costs import TokenCosts
from offramp.research.fitting.backward_induction import fit_stopping, returns
from offramp.research.fitting.budget import (
    fit_budget,
    fit_kept_budget,
    gibbs_shares,
    stage_thresholds,
)
from offramp.research.fitting.greencode import (
    GreenCodeConfig,
    HiddenStateVecEnv,
    greencode_policy,
    rewards,
    train_greencode,
)
from offramp.research.fitting.online import fit_bandit, fit_beta
from offramp.research.hindsight import first_agreeing, oracle, plan_of
from offramp.worker.spec import ModelFacts
from support.cost_tables import leaving


def test_prices_charge_the_probe_of_the_schema(data: TrainingData) -> None:
    costs, exits = data.costs, (2, 4, 6)
    full_s = 0.1 + 8 * 1.0 + 0.5
    candidates_E1 = TokenCosts.under(CANDIDATES_V1, costs, exits).asked_everywhere_E1
    np.testing.assert_allclose(candidates_E1, leaving(costs, exits), rtol=1e-6)
    # The full LM head at each probe, and none where it leaves: the probe's is its own.
    seconds = [0.1 + e + (8 - e) * 0.02 + (i + 1) * (0.5 + 0.02) for i, e in enumerate(exits)]
    expected = [*seconds, full_s + 3 * 0.52]
    softmax_E1 = TokenCosts.under(SOFTMAX_V2, costs, exits).asked_everywhere_E1
    np.testing.assert_allclose(softmax_E1, np.asarray(expected) / full_s)
    unasked = TokenCosts.under(None, costs, exits).price(np.array([0, 3]), np.array([0, 0]))
    np.testing.assert_allclose(unasked, [(0.1 + 2 + 6 * 0.02 + 0.5) / full_s, 1.0])


@pytest.mark.parametrize("budget", [0.5, 0.7, 0.95])
def test_gibbs_shares_keep_the_budget_and_minimise_the_penalised_risk(budget: float) -> None:
    risk_E1, cost_E1 = np.array([0.3, 0.12, 0.04, 0.0]), np.array([0.3, 0.5, 0.8, 1.05])
    share_E1 = gibbs_shares(risk_E1, cost_E1, budget, sharpness=20.0)
    assert share_E1.sum() == pytest.approx(1)
    assert share_E1 @ cost_E1 <= budget + 1e-9

    def objective(each_E1: np.ndarray) -> float:
        return float(each_E1 @ risk_E1 + (each_E1 * np.log(each_E1 * 4)).sum() / 20.0)

    rng = np.random.default_rng(0)
    beaten = 0
    for other_E1 in rng.dirichlet(np.ones(4), size=5000):
        mixed_E1 = 0.99 * share_E1 + 0.01 * other_E1
        if mixed_E1 @ cost_E1 <= budget:
            beaten += 1
            assert objective(mixed_E1) >= objective(share_E1) - 1e-9
    assert beaten > 100
    with pytest.raises(ConfigError, match="cheapest"):
        gibbs_shares(risk_E1, cost_E1, 0.2)


def test_stage_thresholds_let_the_shares_leave() -> None:
    score_NE = np.random.default_rng(1).random((4000, 3), dtype=np.float32)
    share_E1 = np.array([0.25, 0.0, 0.35, 0.4])
    thresholds = stage_thresholds(score_NE, share_E1)
    left_NE = score_NE >= np.asarray(thresholds, np.float32)
    taken_N = np.where(left_NE.any(axis=1), left_NE.argmax(axis=1), 3)
    found = np.bincount(taken_N, minlength=4) / 4000
    np.testing.assert_allclose(found, share_E1, atol=1e-3)


def test_a_fitted_budget_is_kept_on_its_own_tokens(data: TrainingData) -> None:
    policy = fit_budget(data.train, data.costs, 0.75)
    assert replay(policy, data.train, data.costs).cost == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("budget", [0.7, 0.8, 0.9])
def test_a_kept_budget_is_kept_on_other_tokens_and_one_that_was_only_fitted_is_not(
    data: TrainingData, budget: float
) -> None:
    # Heads are surer, or less sure, of texts that they were not fitted to.
    surer = replace(data.validation, softmax_NES=data.validation.softmax_NES + np.float32(0.3))
    fitted = replay(fit_budget(data.train, data.costs, budget), surer, data.costs)
    kept = replay(fit_kept_budget(data.train, data.costs, budget), surer, data.costs)
    assert abs(fitted.cost / budget - 1) > 0.03
    assert abs(kept.cost / budget - 1) < 0.02


def test_backward_induction_beats_any_threshold_it_contains(data: TrainingData) -> None:
    trade_off = 1.0
    policy = fit_stopping(data.train, data.costs, trade_off)
    return_NE1 = returns(data.validation, data.costs, trade_off, "agreement")
    rows = np.arange(len(data.validation))
    mine = return_NE1[rows, walk(policy, data.validation).taken_N].mean()
    for fixed in range(4):
        assert mine > return_NE1[:, fixed].mean()
    for threshold in np.linspace(0.05, 0.95, 10):
        sure_NE = data.validation.margin_NE > threshold
        taken_N = np.where(sure_NE.any(axis=1), sure_NE.argmax(axis=1), 3)
        assert mine > return_NE1[rows, taken_N].mean() - 0.003


def test_backward_induction_carries_realised_returns_back() -> None:
    # Two exits, one feature that decides both: the closed form is to leave where it says so.
    rng = np.random.default_rng(2)
    data = make_two_exits(rng)
    policy = fit_stopping(data.train, data.costs, 0.5)
    walked = walk(policy, data.train)
    return_NE1 = returns(data.train, data.costs, 0.5, "agreement")
    agreement = (walked.taken_N == return_NE1.argmax(axis=1)).mean()
    assert agreement > 0.97


def make_two_exits(rng: np.random.Generator) -> TrainingData:
    tokens = 4000
    features = np.zeros((tokens, 2, CANDIDATES_V1.width), np.float32)
    sign_NE = rng.choice([-1.0, 1.0], size=(tokens, 2))
    features[:, :, 0] = sign_NE
    agree = (sign_NE > 0).astype(np.float32)
    traces = TokenTraces(
        header=TraceHeader(model="ab", schema=CANDIDATES_V1.digest, exits=(2, 4), layers=8),
        features_NEF=features,
        softmax_NES=np.zeros((tokens, 2, 3), np.float32),
        exit_token_NE=np.zeros((tokens, 2), np.int32),
        agree_NE=agree,
        gap_NE=agree - 1,
        right_NE=agree,
        full_right_N=np.ones(tokens, np.float32),
        position_N=np.arange(tokens, dtype=np.int32),
        document_N=np.zeros(tokens, np.int32),
        documents=("d",),
    )
    costs = CostTable(
        layer_s=1.0, head_s=0.5, probe_s=0.1, policy_s=0.0, fill_s=0.0, step_s=0.0, layers=8,
        machine="invented",
    )  # fmt: skip
    facts = ModelFacts(model="ab", tokenizer="cd", layers=8, vocab=4, context=64, width=4)
    table = np.zeros((4, 2), np.int32)
    return TrainingData(
        train=traces, validation=traces, costs=costs, candidates_VK=table, facts=facts
    )


def test_hidden_columns_do_not_reach_a_classifier(data: TrainingData) -> None:
    columns = ("top1", "margin", "entropy", "top_logit", "depth", "position")
    weights = train_phat(data.train, PhatConfig(epochs=1), columns)
    policy = MlpPolicy((2,), CANDIDATES_V1, weights)
    features = data.validation.features_NEF[:64, 0].copy()
    before = policy.logits(features).copy()
    for column in set(CANDIDATES_V1.columns) - set(columns):
        features[:, CANDIDATES_V1.index(column)] += 3.0
    np.testing.assert_array_equal(policy.logits(features), before)
    features[:, 0] += 1.0
    assert np.abs(policy.logits(features) - before).max() > 1e-3
    with pytest.raises(ConfigError, match="bogus"):
        train_phat(data.train, PhatConfig(), ["bogus"])


def test_free_starts_from_training_tokens(data: TrainingData) -> None:
    train = replace(data.train, softmax_NES=np.clip(data.train.softmax_NES, 0.01, 0.99))
    policy = fit_beta(train, 4, 0.4, "margin")
    confidence_N, agreed_N = train.margin_NE[:, 1], train.agree_NE[:, 1] > 0
    means = policy.moments_23[:, 1] / policy.moments_23[:, 0]
    expected = [confidence_N[~agreed_N].mean(), confidence_N[agreed_N].mean()]
    np.testing.assert_allclose(means, expected, rtol=1e-4)
    assert policy.moments_23[:, 0].max() <= 200.0
    assert policy.exits == (4,)


def test_a_bandit_starts_from_training_rewards(data: TrainingData) -> None:
    policy = fit_bandit(data.train, data.costs, 0.5, [0.2, 0.9])
    assert policy.counts_A.tolist() == [5.0, 5.0]
    means = policy.sums_A / policy.counts_A
    assert (means < 1).all()
    assert policy.arm == int(np.argmax(means))
    walked = walk(policy, data.validation)
    assert set(walked.taken_N.tolist()) == {0, 1, 2, 3}


def test_the_oracle_is_cheapest_and_never_wrong(data: TrainingData) -> None:
    traces, costs = data.validation, data.costs
    walked = oracle(traces, costs)
    quality = traces.quality("agreement")[np.arange(len(traces)), walked.taken_N]
    assert quality.min() == 1
    assert (walked.taken_N == first_agreeing(traces)).all()
    cheapest = mean_cost(NeverExit(), walked, traces, costs)
    assert cheapest < 1
    bold = oracle(traces, costs, trade_off=3.0)
    assert mean_cost(NeverExit(), bold, traces, costs) < cheapest


def test_an_oracle_runs_as_a_plan_on_its_own_document(data: TrainingData) -> None:
    one = data.validation.select(data.validation.documents[:1])
    walked = walk(plan_of(one), one)
    np.testing.assert_array_equal(walked.taken_N, first_agreeing(one))


def with_states(traces: TokenTraces) -> TokenTraces:
    rng = np.random.default_rng(3)
    state_NED = rng.normal(size=(*traces.agree_NE.shape, 16)).astype(np.float16)
    state_NED[:, :, 0] = traces.agree_NE * 2 - 1  # one column says whether the exit is right
    header = replace(traces.header, width=16)
    return replace(traces, header=header, state_NED=state_NED)


def test_greencode_pays_as_its_authors_do(data: TrainingData) -> None:
    exits, layers = (2, 4, 6), 8
    reward_NE2 = rewards(data.train)
    for row in range(300):
        right = data.train.agree_NE[row] > 0
        best = next((layer for layer, yes in zip(exits, right, strict=True) if yes), layers)
        for index, layer in enumerate(exits):
            position = index / 2
            if layer == best:
                leave = position
            elif right[index]:
                leave = -(layer - best) * 0.75
            elif layer < best:
                leave = -(best - layer) * 1.0
            else:
                leave = -1.0
            following = (*exits, layers)[index + 1]
            go_on = position if layer < best else -(following - best) * 1.0
            expected = [each / 6 if each < 0 else each for each in (go_on, leave)]
            np.testing.assert_allclose(reward_NE2[row, index], expected, atol=1e-6)


def test_greencode_walks_a_token_from_exit_to_exit(data: TrainingData) -> None:
    traces = with_states(data.train)
    assert traces.state_NED is not None
    normaliser = Normaliser(np.zeros(16, np.float32), np.ones(16, np.float32))
    env = HiddenStateVecEnv(traces, normaliser, envs=4, seed=1)
    first_BD = env.reset()
    rows_B = env.get_attr("_row_B")[0].copy()
    np.testing.assert_array_equal(first_BD, traces.state_NED[rows_B, 0].astype(np.float32))
    env.step_async(np.array([0, 1, 0, 1]))
    second_BD, reward_B, done_B, infos = env.step_wait()
    assert done_B.tolist() == [False, True, False, True]
    np.testing.assert_array_equal(second_BD[0], traces.state_NED[rows_B[0], 1])
    expected = rewards(traces)[rows_B, 0, [0, 1, 0, 1]]
    np.testing.assert_array_equal(reward_B, expected)
    assert ["terminal_observation" in info for info in infos] == [False, True, False, True]


def test_greencode_learns_what_the_state_says(data: TrainingData) -> None:
    traces = with_states(data.train)
    config = GreenCodeConfig(steps=40_000, envs=64)
    weights = train_greencode(traces, config)
    policy = greencode_policy(weights, (2, 4, 6), 0.0)
    held_out = with_states(data.validation)
    assert policy.schema.width == 16
    found = replay(policy, held_out, data.costs)
    assert found.agreement > 0.9
    assert found.mean_layers < 7
    with pytest.raises(TraceError, match="--states"):
        train_greencode(data.train, config)
    with pytest.raises(ConfigError, match="'hidden' version 1 was not recorded"):
        replay(policy, data.validation, data.costs)
