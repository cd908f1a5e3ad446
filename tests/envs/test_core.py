"""The core against closed forms and plain loops. Shape suffixes: B episodes, E exits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.envs import Finals, Quality, TokenExitCore, TokenTraces
from support.cost_tables import leaving


def closed_form(quality: float, cost: float, preference: float) -> float:
    return (quality - preference * cost) / (1 + preference)


def play(core: TokenExitCore, leave_at: int, **start: Any) -> tuple[float, int, Finals]:
    """Plain loop: go on ``leave_at`` times, then leave (or fall off the end). Total reward."""
    core.reset(**start)
    total = 0.0
    for step in range(leave_at + 1):
        batch = core.step(np.array([int(step == leave_at)]))
        total += batch.reward_B[0]
        if batch.terminated_B[0]:
            return total, step + 1, batch.finals
    raise AssertionError("the episode never ended")


@pytest.fixture
def core(traces: TokenTraces, costs: CostTable) -> TokenExitCore:
    return TokenExitCore(traces, costs, num_envs=1, autoreset=False)


@pytest.mark.parametrize("leave_at", range(4), ids=["exit2", "exit4", "exit7", "full"])
@pytest.mark.parametrize("preference", [1e-6, 0.3, 40.0])
def test_the_return_is_the_closed_form(
    core: TokenExitCore, traces: TokenTraces, costs: CostTable, leave_at: int, preference: float
) -> None:
    cost_E1 = leaving(costs, traces.header.exits)
    quality_NE1 = traces.quality("logprob_gap")
    for token in range(0, len(traces), 7):
        total, steps, finals = play(core, leave_at, tokens=token, lambdas=preference)
        expected = closed_form(quality_NE1[token, leave_at], cost_E1[leave_at], preference)
        assert total == pytest.approx(expected, abs=1e-6)
        assert steps == min(leave_at + 1, 3)
        info = finals.rows()[0]
        assert info["exit_layer"] == (2, 4, 7, 8)[leave_at]
        assert info["quality"] == quality_NE1[token, leave_at]
        assert info["cost"] == pytest.approx(cost_E1[leave_at])
        assert info["agree"] == (1 if leave_at == 3 else traces.agree_NE[token, leave_at])
        assert info["token"] == token


def test_the_closed_form_check_can_fail(
    core: TokenExitCore, traces: TokenTraces, costs: CostTable
) -> None:
    total, _, finals = play(core, 1, tokens=3, lambdas=0.3)
    info = finals.rows()[0]
    assert abs(total - closed_form(info["quality"], info["cost"], 0.31)) > 1e-4
    assert abs(total - closed_form(info["quality"], leaving(costs, (2, 4, 7))[2], 0.3)) > 1e-2


def test_the_first_step_pays_the_whole_way_to_the_first_exit(
    core: TokenExitCore, costs: CostTable
) -> None:
    core.reset(tokens=0, lambdas=1.0)
    batch = core.step(np.array([0]))
    assert batch.reward_B[0] == pytest.approx(-leaving(costs, (2, 4, 7))[0] / 2)
    assert not len(batch.finals.place_K)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_returns_of_many_random_episodes_have_the_closed_form(
    traces: TokenTraces, costs: CostTable, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**32))
    low = data.draw(st.floats(1e-6, 1e3))
    kind: Quality = data.draw(st.sampled_from(["agreement", "logprob_gap"]))
    leaving = data.draw(st.floats(0, 1))
    core = TokenExitCore(traces, costs, num_envs=17, lambda_range=(low, low * 1000), quality=kind)
    obs_BD = core.reset(seed)
    actions = np.random.default_rng(seed)
    total_B = np.zeros(17)
    for _ in range(12):
        batch = core.step((actions.random(17) < leaving).astype(np.int64))
        total_B += batch.reward_B
        for place, info in zip(batch.finals.place_K, batch.finals.rows(), strict=True):
            assert low * 0.999 <= info["lambda"] <= low * 1001
            assert info["lambda"] == np.exp(np.float64(obs_BD[place, -1]))
            expected = closed_form(info["quality"], info["cost"], info["lambda"])
            assert total_B[place] == pytest.approx(expected, abs=1e-9)
            total_B[place] = 0
        obs_BD = batch.obs_BD


def test_observations_are_the_features_at_the_present_exit(
    core: TokenExitCore, traces: TokenTraces
) -> None:
    obs_BD = core.reset(tokens=11, lambdas=0.5)
    for exit_index in range(3):
        np.testing.assert_array_equal(obs_BD[0, :-1], traces.features_NEF[11, exit_index])
        assert obs_BD[0, -1] == pytest.approx(np.log(0.5))
        batch = core.step(np.array([0]))
        obs_BD = batch.obs_BD
    np.testing.assert_array_equal(batch.finals.obs_KD[0, :-1], traces.features_NEF[11, 2])


def record(core: TokenExitCore, seed: int, steps: int = 30) -> list[NDArray[Any]]:
    rng = np.random.default_rng(7)
    out: list[NDArray[Any]] = [core.reset(seed)]
    for _ in range(steps):
        batch = core.step(rng.integers(2, size=core.num_envs))
        out += [batch.obs_BD, batch.reward_B, batch.terminated_B, batch.finals.info["token"]]
    return out


def test_a_seed_fixes_everything_and_another_seed_changes_it(
    traces: TokenTraces, costs: CostTable
) -> None:
    first = record(TokenExitCore(traces, costs, num_envs=5), 3)
    again = record(TokenExitCore(traces, costs, num_envs=5), 3)
    other = record(TokenExitCore(traces, costs, num_envs=5), 4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_resetting_without_a_seed_goes_on_with_the_generator(
    traces: TokenTraces, costs: CostTable
) -> None:
    core = TokenExitCore(traces, costs, num_envs=5)
    assert not np.array_equal(core.reset(3), core.reset())
    assert isinstance(core.rng.bit_generator, np.random.PCG64)


def test_returned_arrays_are_never_reused(traces: TokenTraces, costs: CostTable) -> None:
    core = TokenExitCore(traces, costs, num_envs=6)
    kept: list[NDArray[Any]] = [core.reset(0)]
    copies = [kept[0].copy()]
    for step in range(8):
        batch = core.step(np.full(6, step % 2))
        new: list[NDArray[Any]] = [*batch[:3], batch.finals.obs_KD, *batch.finals.info.values()]
        assert not any(np.shares_memory(a, b) for a in new for b in kept)
        kept += new
        copies += [array.copy() for array in new]
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_writing_to_an_observation_changes_neither_traces_nor_episode(
    core: TokenExitCore, traces: TokenTraces
) -> None:
    before = traces.features_NEF.copy()
    core.reset(tokens=4)[:] = 99
    batch = core.step(np.array([1]))
    np.testing.assert_array_equal(traces.features_NEF, before)
    np.testing.assert_array_equal(batch.finals.obs_KD[0, :-1], before[4, 0])


def test_lambda_is_drawn_log_uniformly(traces: TokenTraces, costs: CostTable) -> None:
    core = TokenExitCore(traces, costs, num_envs=4000, lambda_range=(0.01, 100))
    log_lambda_B = core.reset(0)[:, -1]
    edges = np.linspace(np.log(0.01), np.log(100), 5)
    counts, _ = np.histogram(log_lambda_B, edges)
    assert counts.sum() == 4000
    assert (np.abs(counts - 1000) < 130).all(), counts  # 4.7 standard deviations


def test_tokens_are_drawn_uniformly(traces: TokenTraces, costs: CostTable) -> None:
    core = TokenExitCore(traces, costs, num_envs=6000)
    core.reset(0)
    finals = core.step(np.ones(6000, np.int64)).finals
    counts = np.bincount(finals.info["token"], minlength=60)
    assert (np.abs(counts - 100) < 50).all(), counts  # 5 standard deviations


def test_a_range_of_one_value_is_that_value(traces: TokenTraces, costs: CostTable) -> None:
    core = TokenExitCore(traces, costs, num_envs=9, lambda_range=(0.25, 0.25))
    np.testing.assert_allclose(np.exp(core.reset(0)[:, -1]), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    "actions",
    [
        np.array([0, 2]),
        np.array([-1, 0]),
        np.array([0]),
        np.array([0.0, 1.0]),
        np.zeros((2, 1), int),
    ],
    ids=["two", "negative", "too few", "float", "2-D"],
)
def test_invalid_actions_are_refused(
    traces: TokenTraces, costs: CostTable, actions: NDArray[Any]
) -> None:
    core = TokenExitCore(traces, costs, num_envs=2)
    with pytest.raises(ConfigError, match="actions"):
        core.step(actions)


@pytest.mark.parametrize(
    "change",
    [
        {"num_envs": 0},
        {"lambda_range": (1.0, 0.5)},
        {"lambda_range": (0.0, 1.0)},
        {"lambda_range": (1.0, float("inf"))},
        {"lambda_range": (float("nan"), 1.0)},
        {"quality": "bleu"},
    ],
)
def test_unusable_arguments_are_named(
    traces: TokenTraces, costs: CostTable, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        TokenExitCore(traces, costs, **{"num_envs": 1, **change})


def test_costs_of_another_model_are_refused(traces: TokenTraces, costs: CostTable) -> None:
    with pytest.raises(ConfigError, match="12 layers, not of one with 8"):
        TokenExitCore(traces, dataclasses.replace(costs, layers=12), num_envs=1)


@pytest.mark.parametrize("value", [101.0, -101.0, np.nan])
def test_features_beyond_the_declared_bounds_are_refused(
    traces: TokenTraces, costs: CostTable, value: float
) -> None:
    features_NEF = traces.features_NEF.copy()
    features_NEF[5, 1, 3] = value
    with pytest.raises(TraceError, match="features_NEF"):
        TokenExitCore(dataclasses.replace(traces, features_NEF=features_NEF), costs, num_envs=1)


@pytest.mark.parametrize("start", [{"tokens": 60}, {"tokens": -1}, {"lambdas": 0.0}])
def test_starts_out_of_range_are_refused(core: TokenExitCore, start: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be from"):
        core.reset(**start)
