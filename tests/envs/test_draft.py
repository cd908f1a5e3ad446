"""Draft-and-verify episodes against a slow simulation, and against closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_sb3

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import OUTLOOK_V1, SOFTMAX_V2
from offramp.controller.policies.drafts.draft_trust import ODDS_SCALE, chances_of
from offramp.controller.policies.exits import Exit
from offramp.envs import DRAFT_ENV_ID, DraftExitCore, TokenTraces
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from support.cost_tables import measured
from support.slow_drafting import SlowEpisode, drafted_traces

MODEL = "ab" * 32
FEATURES = SOFTMAX_V2.width
COPY = (Exit(4, "int4"), Exit(12, "int4"))


@pytest.fixture(scope="module")
def traces() -> TokenTraces:
    return drafted_traces()


def core_of(traces: TokenTraces, num_envs: int = 1, **options: Any) -> DraftExitCore:
    return DraftExitCore(traces, measured(MODEL), num_envs=num_envs, **options)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    max_pending=st.integers(1, 8),
    bias=st.floats(0, 0.9),
    token=st.integers(0, 10),
    exits=st.sampled_from([(2, 4, 7), (*COPY, 2, 7), (COPY[1], 2, 4), COPY]),
)
def test_it_pays_earns_and_counts_as_the_slow_simulation(
    seed: int, max_pending: int, bias: float, token: int, exits: tuple[int, ...]
) -> None:
    traces = drafted_traces(seed=seed, exits=exits)
    core = core_of(traces, max_pending=max_pending, rate=1.3, autoreset=False)
    slow = SlowEpisode(traces, measured(MODEL), token, 12, max_pending)
    core.reset(tokens=token)
    rng = np.random.default_rng(seed)
    full_s = measured(MODEL).full_s
    while not slow.is_over:
        leaves = rng.random() < bias  # so that many drafts are open now and then
        action = 0 if leaves else int(rng.choice(np.flatnonzero(core.action_masks()[0])))
        before = (slow.tokens, slow.seconds)
        slow.act(action)
        step = core.step(np.array([action]))
        tokens, seconds = slow.tokens - before[0], slow.seconds - before[1]
        np.testing.assert_allclose(step.vector_BV[0], [tokens, -seconds / full_s], rtol=1e-12)
        np.testing.assert_allclose(step.reward_B, tokens - 1.3 * seconds / full_s)
        assert bool(step.terminated_B[0]) == slow.is_over
    info = {name: column[0] for name, column in step.finals.info.items()}
    assert (info["tokens"], info["cycles"]) == (12 - token, slow.cycles)
    assert (info["layer_calls"], info["copy_calls"]) == (slow.calls, slow.copy_calls)
    assert info["seconds"] == pytest.approx(slow.seconds)


def test_observations_are_what_the_probe_would_see(traces: TokenTraces) -> None:
    core = core_of(traces)
    start = core.reset(tokens=5)[0]
    assert not start[:FEATURES].any()
    assert start[-2:].tolist() == [1, 0]
    at_first = core.step(np.array([0])).obs_BD[0]
    np.testing.assert_array_equal(at_first[:3], traces.softmax_NES[5, 0])
    assert at_first[3:5].tolist() == [0, 0]  # nothing to agree with
    at_last = core.step(np.array([2])).obs_BD[0]  # over the second exit
    agrees = traces.exit_token_NE[5, 2] == traces.exit_token_NE[5, 0]
    np.testing.assert_allclose(at_last[3:6], [agrees, agrees / 3, 7 / 12], rtol=1e-6)
    left = core.step(np.array([0])).obs_BD[0]
    assert left[-2] == pytest.approx(traces.softmax_NES[5, 2, 0], rel=1e-6)
    # Odds are shown at an exit, and were those of its top-1 probability.
    assert chances_of(at_last[-3:-2] * ODDS_SCALE) == pytest.approx(left[-2], rel=1e-6)
    assert left[-3] == 0
    outlook = dict(zip(OUTLOOK_V1.columns, left[FEATURES:-3].tolist(), strict=True))
    assert outlook["pending"] == 1 / 8
    assert outlook["last_depth"] == pytest.approx(7 / 12)
    assert (outlook["step"], outlook["left"]) == (7 / 256, 6 / 256)


def test_an_exit_of_the_models_layers_is_not_compared_to_one_on_the_copy() -> None:
    traces = drafted_traces(exits=(*COPY, 2, 7))
    core = core_of(traces)
    core.reset(tokens=5)
    agrees, runs = (SOFTMAX_V2.index(name) for name in ("agrees", "run_length"))
    for here, (action, before) in enumerate(((0, None), (1, 0), (1, None), (1, 2))):
        shown = core.step(np.array([action])).obs_BD[0]
        same = before is not None and (
            traces.exit_token_NE[5, here] == traces.exit_token_NE[5, before]
        )
        assert shown[agrees] == same
        assert shown[runs] == same / 4
        assert shown[SOFTMAX_V2.index("depth")] == pytest.approx((4, 12, 2, 7)[here] / 12)


def test_costs_without_the_copy_are_refused() -> None:
    costs = replace(measured(MODEL), copies={})
    with pytest.raises(ConfigError, match="--draft-weights int4"):
        DraftExitCore(drafted_traces(exits=(*COPY, 2)), costs, num_envs=1)


def test_the_same_seed_gives_the_same_episodes(traces: TokenTraces) -> None:
    def rewards() -> list[float]:
        core = core_of(traces, 4)
        core.reset(7)
        actions = np.random.default_rng(1).integers(4, size=(50, 4))
        return [reward for row in actions for reward in core.step(row).reward_B.tolist()]

    assert rewards() == rewards()


def test_many_episodes_are_as_many_lone_ones(traces: TokenTraces) -> None:
    tokens = [0, 3, 12, 30]
    many = core_of(traces, 4, autoreset=False)
    many.reset(tokens=tokens)
    lone = [core_of(traces, autoreset=False) for _ in tokens]
    for core, token in zip(lone, tokens, strict=True):
        core.reset(tokens=token)
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(4, size=4)
        both = many.step(actions)
        each = [core.step(actions[i : i + 1]) for i, core in enumerate(lone)]
        np.testing.assert_array_equal(both.obs_BD, np.concatenate([one.obs_BD for one in each]))
        np.testing.assert_array_equal(both.reward_B, [one.reward_B[0] for one in each])


def test_rewards_sum_to_tokens_less_rate_times_seconds(traces: TokenTraces) -> None:
    core = core_of(traces, rate=1.7, autoreset=False)
    core.reset(tokens=0)
    total, rng = 0.0, np.random.default_rng(3)
    while not (step := core.step(rng.integers(4, size=1))).terminated_B[0]:
        total += step.reward_B[0]
    info = step.finals.info
    expected = info["tokens"][0] - 1.7 * info["seconds"][0] / measured(MODEL).full_s
    assert total + step.reward_B[0] == pytest.approx(expected)


def test_full_depth_alone_earns_nothing_at_the_rate_of_one() -> None:
    traces = drafted_traces()
    free = measured(MODEL).with_probe("softmax").scaled("policy", 0.0)
    core = DraftExitCore(traces, free, num_envs=1, autoreset=False)
    core.reset(tokens=0)
    while not (step := core.step(np.array([3]))).terminated_B[0]:
        assert step.reward_B[0] == pytest.approx(0)


def test_cycles_end_an_episode(traces: TokenTraces) -> None:
    core = core_of(traces, cycles=2, autoreset=False)
    core.reset(tokens=0)
    assert not core.step(np.array([3])).terminated_B[0]
    assert core.step(np.array([3])).terminated_B[0]


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_it_is_registered(traces: TokenTraces, make: Any) -> None:
    env = make(DRAFT_ENV_ID, traces=traces, costs=measured(MODEL))
    _, info = env.reset(seed=0)
    assert "action_mask" in info


def test_gymnasium_and_sb3_find_nothing_wrong(traces: TokenTraces) -> None:
    env = gym.make(DRAFT_ENV_ID, traces=traces, costs=measured(MODEL)).unwrapped
    check_env(env, skip_render_check=True)
    check_sb3(env)


def test_sb3_vectors_say_what_an_ended_episode_was(traces: TokenTraces) -> None:
    env = CoreVecEnv(DraftExitCore(traces, measured(MODEL), num_envs=2, cycles=1))
    env.reset()
    obs_BD, reward_B, done_B, infos = env.step(np.array([3, 3]))
    assert done_B.all()
    assert reward_B.dtype == np.float32
    assert [info["tokens"] for info in infos] == [1, 1]
    assert obs_BD.shape == (2, 18)
    assert infos[0]["terminal_observation"].shape == (18,)


def test_bad_arguments_are_refused(traces: TokenTraces) -> None:
    bad: list[dict[str, Any]] = [{"num_envs": 0}, {"max_pending": 0}, {"cycles": 0}, {"rate": -1.0}]
    for options in bad:
        with pytest.raises(ConfigError):
            DraftExitCore(traces, measured(MODEL), **{"num_envs": 1, **options})
    with pytest.raises(ConfigError, match="costs"):
        core_of(drafted_traces(model="cd" * 32))
    with pytest.raises(ConfigError, match="tokens"):
        core_of(traces, max_pending=9)  # launches of ten tokens were not measured
    with pytest.raises(ConfigError, match="schema"):
        DraftExitCore(traces, replace(measured(MODEL), probes={}), num_envs=1)
    with pytest.raises(TraceError):
        core_of(drafted_traces(tokens=1))
    core = core_of(traces)
    for actions in (np.array([4]), np.array([-1]), np.array([0.5]), np.array([0, 0])):
        with pytest.raises(ConfigError, match="actions"):
            core.step(actions)
    for token in (11, -1, 36):  # the last of a document, and none at all
        with pytest.raises(ConfigError, match="token"):
            core.reset(tokens=token)
    with pytest.raises(ConfigError, match="options"):
        core.reset(lambdas=1.0)
