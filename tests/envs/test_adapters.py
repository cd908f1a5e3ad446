"""The three adapters agree with each other, and both checkers with the environment."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsInt

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import offramp.envs
import offramp.envs.adapters.sequence_env
import offramp.envs.adapters.token_env
import offramp.envs.live.live_env
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, FloatArray
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import (
    DRAFT_ENV_ID,
    ENV_ID,
    LIVE_ENV_ID,
    PREFILL_ENV_ID,
    SEQUENCE_ENV_ID,
    SequenceExitEnv,
    TokenExitEnv,
    TokenExitVectorEnv,
    TokenTraces,
    TraceStore,
)
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.cores.token_core import TokenExitCore

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    (ENV_ID, {}),
    (ENV_ID, {"actions": "jump", "asks_first": True, "ends": True}),
    (SEQUENCE_ENV_ID, {}),
    (SEQUENCE_ENV_ID, {"actions": "gate", "kv_mode": "defer", "pending_share": 0.2}),
]


@pytest.fixture(params=VARIANTS, ids=["gate", "jump", "project", "defer"])
def env(request: pytest.FixtureRequest, traces: TokenTraces, costs: CostTable) -> gym.Env[Any, Any]:
    name, options = request.param
    return gym.make(name, traces=traces, costs=costs, **options)


def check_strictly(check: Callable[[Any], None], env: gym.Env[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(env)


@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
def test_the_checkers_find_nothing_not_even_a_warning(
    env: gym.Env[Any, Any], check: Callable[[Any], None]
) -> None:
    check_strictly(check, env.unwrapped)


class LyingEnv(TokenExitEnv):
    def step(self, action: SupportsInt) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs + 1000, reward, terminated, truncated, info


@pytest.mark.parametrize("check", [gymnasium_check_env, sb3_check_env])
def test_the_checkers_can_fail(
    traces: TokenTraces, costs: CostTable, check: Callable[[Any], None]
) -> None:
    with pytest.raises((AssertionError, UserWarning), match=r"observation space|bounds"):
        check_strictly(check, LyingEnv(traces=traces, costs=costs))


def test_every_registered_id_of_ours_is_checked_here() -> None:
    ours = {name for name in gym.registry if name.startswith("offramp/")}
    # Two need an engine: test_live.py and test_prefill_env.py check them; test_draft.py its own.
    assert ours == {name for name, _ in VARIANTS} | {LIVE_ENV_ID, PREFILL_ENV_ID, DRAFT_ENV_ID}


def test_the_docstring_example_runs() -> None:
    for module in (
        offramp.envs.adapters.token_env,
        offramp.envs.adapters.sequence_env,
        offramp.envs.live.live_env,
    ):
        results = doctest.testmod(module)
        assert results.attempted > 10
        assert not results.failed


def test_the_documented_columns_are_the_schema_and_the_preference() -> None:
    for env, schema in ((TokenExitEnv, CANDIDATES_V1), (SequenceExitEnv, OUTLOOK_V1)):
        rows = re.findall(r"^ +\| (\w+) \|", env.__doc__ or "", re.MULTILINE)
        assert tuple(rows) == ("column", *schema.columns, "log_lambda", "log_mu")


def test_the_public_names_are_pinned_and_import_no_learner() -> None:
    assert offramp.envs.__all__ == sorted(offramp.envs.__all__, key=lambda n: (not n.isupper(), n))
    assert all(hasattr(offramp.envs, name) for name in offramp.envs.__all__)
    code = "import offramp.envs, sys; print({'torch', 'stable_baselines3'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_one_env_plays_the_episodes_of_a_vector_of_one(
    traces: TokenTraces, costs: CostTable
) -> None:
    env = TokenExitEnv(traces=traces, costs=costs)
    vector = TokenExitVectorEnv(num_envs=1, traces=traces, costs=costs)
    obs, _ = env.reset(seed=5)
    obs_BD, _ = vector.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        np.testing.assert_array_equal(obs, obs_BD[0])
        action = rng.integers(2)
        obs, reward, terminated, truncated, info = env.step(action)
        obs_BD, reward_B, terminated_B, truncated_B, infos = vector.step(np.array([action]))
        assert (reward, terminated, truncated) == (reward_B[0], terminated_B[0], truncated_B[0])
        if terminated:
            np.testing.assert_array_equal(obs, infos["final_obs"][0])
            assert_same_info(info, infos["final_info"], 0)
            obs, _ = env.reset()


def test_the_vector_env_is_gymnasiums_own_same_step_vector_of_single_envs(
    traces: TokenTraces, costs: CostTable
) -> None:
    """Same infos, masks and dtypes as SyncVectorEnv, whose sub-environments replay its tokens."""
    single = [TokenExitEnv(traces=traces, costs=costs) for _ in range(6)]
    theirs = gym.vector.SyncVectorEnv(
        [lambda env=env: env for env in single],  # type: ignore[misc]  # mypy cannot infer it
        autoreset_mode="SameStep",
    )
    ours = gym.make_vec(ENV_ID, num_envs=6, traces=traces, costs=costs)
    assert isinstance(ours, TokenExitVectorEnv)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    tokens, lambdas = np.arange(6) * 9, np.linspace(0.1, 2, 6)
    ours.reset(seed=1, options={"token": tokens, "lambda": lambdas})
    theirs.reset()
    for env, token, preference in zip(single, tokens, lambdas, strict=True):
        env.reset(options={"token": token, "lambda": preference})
    # All of these end on the last step, so that the next, differently drawn episodes never show.
    schedule = [[0] * 6, [0] * 6, [1, 0, 1, 0, 1, 0]]
    for actions in schedule:
        mine, others = ours.step(np.array(actions)), theirs.step(np.array(actions))
        for a, b in zip(mine[1:4], others[1:4], strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
        assert_same_infos(mine[4], others[4])
    assert mine[2].all()


def assert_same_info(one: dict[str, Any], many: dict[str, Any], place: int) -> None:
    assert set(one) == {name for name in many if not name.startswith(("_", "final"))}
    for name, value in one.items():
        assert many[f"_{name}"][place]
        np.testing.assert_array_equal(value, many[name][place])


def assert_same_infos(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_same_infos(mine[name], value)
        elif value.dtype == object:
            np.testing.assert_array_equal(np.stack(mine[name]), np.stack(value))
        else:
            np.testing.assert_array_equal(mine[name], value)
            assert mine[name].dtype == value.dtype


def test_final_infos_are_masked_where_no_episode_ended(
    traces: TokenTraces, costs: CostTable
) -> None:
    vector = TokenExitVectorEnv(num_envs=3, traces=traces, costs=costs)
    vector.reset(seed=0)
    *_, infos = vector.step(np.array([0, 1, 0]))
    assert infos["_final_obs"].tolist() == [False, True, False]
    assert infos["final_obs"][0] is None
    assert infos["final_info"]["exit_layer"].tolist() == [0, 2, 0]
    assert infos["final_info"]["_exit_layer"].tolist() == [False, True, False]
    assert infos["_reward_vector"].tolist() == [True, False, True]
    assert set(vector.step(np.zeros(3, np.int64))[4]) == {"reward_vector", "_reward_vector"}


def test_the_sb3_vec_env_gives_what_the_vector_env_gives(
    traces: TokenTraces, costs: CostTable
) -> None:
    vector = TokenExitVectorEnv(num_envs=8, traces=traces, costs=costs, quality="agreement")
    vec_env = CoreVecEnv(TokenExitCore(traces, costs, num_envs=8, quality="agreement"))
    vec_env.seed(11)
    np.testing.assert_array_equal(vector.reset(seed=11)[0], vec_env.reset())
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(50):
        actions = rng.integers(2, size=8)
        obs_BD, reward_B, terminated_B, _, infos = vector.step(actions)
        sb3_obs_BD, sb3_reward_B, done_B, sb3_infos = vec_env.step(actions)
        np.testing.assert_array_equal(obs_BD, sb3_obs_BD)
        np.testing.assert_array_equal(reward_B.astype(np.float32), sb3_reward_B)
        np.testing.assert_array_equal(terminated_B, done_B)
        for place in range(8):
            info = sb3_infos[place]
            if not done_B[place]:
                assert info == {}
                np.testing.assert_array_equal(
                    vec_env.reward_vectors[place], infos["reward_vector"][place]
                )
                continue
            ended += 1
            np.testing.assert_array_equal(
                info.pop("terminal_observation"), infos["final_obs"][place]
            )
            info["reward_vector"] = vec_env.reward_vectors[place]
            assert_same_info(info, infos["final_info"], place)
    assert ended > 50


def test_a_store_serves_as_well_as_its_traces(
    tmp_path: Path, header: TraceHeader, make_chunk: Callable[..., TraceChunk], costs: CostTable
) -> None:
    store = TraceStore.create(tmp_path, header)
    store.append(make_chunk("a"), "train")
    env = gym.make(ENV_ID, store=tmp_path, split="train", costs=costs)
    same = gym.make(ENV_ID, traces=store.read("train"), costs=costs)
    np.testing.assert_array_equal(env.reset(seed=1)[0], same.reset(seed=1)[0])


@pytest.mark.parametrize("action", [2, -1, 0.5, None, "leave"])
def test_an_invalid_action_is_refused(traces: TokenTraces, costs: CostTable, action: Any) -> None:
    env = TokenExitEnv(traces=traces, costs=costs)
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="Use 0 to go on and 1 to leave"):
        env.step(action)


def test_a_step_outside_an_episode_is_refused(traces: TokenTraces, costs: CostTable) -> None:
    env = TokenExitEnv(traces=traces, costs=costs)
    with pytest.raises(ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    env.step(1)
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_an_unknown_option_is_refused(traces: TokenTraces, costs: CostTable) -> None:
    env = TokenExitEnv(traces=traces, costs=costs)
    with pytest.raises(ConfigError, match="'tokens' is unknown"):
        env.reset(options={"tokens": 3})
