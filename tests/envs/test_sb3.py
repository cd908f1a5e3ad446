"""Stable-Baselines3 on the VecEnv: returns against a plain loop, training, its contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.envs import TokenTraces
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.cores.token_core import TokenExitCore

ENVS, STEPS = 6, 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vec_env(traces: TokenTraces, costs: CostTable) -> CoreVecEnv:
    return CoreVecEnv(TokenExitCore(traces, costs, num_envs=ENVS, lambda_range=(0.05, 1.0)))


class Infos(BaseCallback):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Keeps the infos of every step."""

    def _on_training_start(self) -> None:
        self.seen: list[list[dict[str, Any]]] = []

    def _on_step(self) -> bool:
        self.seen.append(self.locals["infos"])
        return True


def collect(
    vec_env: CoreVecEnv, gamma: float = 1.0
) -> tuple[Any, NDArray[np.bool_], FloatArray, Infos]:
    model = PPO(
        "MlpPolicy",
        vec_env,
        n_steps=STEPS,
        batch_size=ENVS * STEPS,
        gamma=gamma,
        gae_lambda=1.0,
        seed=1,
        device="cpu",
    )
    _, callback = model._setup_learn(ENVS * STEPS, Infos())
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, STEPS)
    last_B = model.policy.predict_values(torch.as_tensor(model._last_obs)).detach().numpy()[:, 0]
    return model.rollout_buffer, model._last_episode_starts, last_B, callback


def plain_returns(
    buffer: Any, last_done_B: NDArray[np.bool_], last_value_B: FloatArray
) -> NDArray[np.float64]:
    """Undiscounted reward to go: to the episode's end, or to the rollout's and then the value."""
    returns = np.zeros((STEPS, ENVS))
    for env in range(ENVS):
        for start in range(STEPS):
            total = 0.0
            for step in range(start, STEPS):
                total += float(buffer.rewards[step, env])
                at_end = step == STEPS - 1
                if last_done_B[env] if at_end else buffer.episode_starts[step + 1, env]:
                    break
                if at_end:
                    total += float(last_value_B[env])
            returns[start, env] = total
    return returns


def test_sb3_returns_and_advantages_match_a_plain_loop(vec_env: CoreVecEnv) -> None:
    buffer, last_done_B, last_value_B, _ = collect(vec_env)
    expected = plain_returns(buffer, last_done_B, last_value_B)
    np.testing.assert_allclose(buffer.returns, expected, atol=1e-5)
    np.testing.assert_allclose(buffer.advantages, expected - buffer.values, atol=1e-5)


def test_the_plain_loop_disagrees_with_discounted_returns(vec_env: CoreVecEnv) -> None:
    buffer, last_done_B, last_value_B, _ = collect(vec_env, gamma=0.9)
    expected = plain_returns(buffer, last_done_B, last_value_B)
    assert np.abs(buffer.returns - expected).max() > 1e-2


def test_returns_at_an_episodes_start_are_the_closed_form(vec_env: CoreVecEnv) -> None:
    buffer, _, _, callback = collect(vec_env)
    infos = callback.seen
    checked = 0
    for env in range(ENVS):
        start = 0
        for step in range(STEPS):
            if info := infos[step][env]:
                value = info["quality"] - info["lambda"] * info["cost"]
                expected = value / (1 + info["lambda"])
                assert buffer.returns[start, env] == pytest.approx(expected, abs=1e-5)
                checked, start = checked + 1, step + 1
    assert checked > 20


def test_ppo_trains_directly_and_under_a_monitor(vec_env: CoreVecEnv) -> None:
    model = PPO("MlpPolicy", vec_env, n_steps=8, batch_size=48, n_epochs=1, device="cpu")
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(ENVS * 8 * 2)
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))
    model.set_env(VecMonitor(vec_env))
    model.learn(ENVS * 8)
    assert model.ep_info_buffer
    mean, _ = evaluate_policy(model, VecMonitor(vec_env), n_eval_episodes=5)
    assert np.isfinite(mean)


@pytest.mark.parametrize(("preference", "leaves"), [(50.0, True), (1e-6, False)])
def test_ppo_learns_to_leave_only_when_time_is_dear(
    traces: TokenTraces, costs: CostTable, preference: float, leaves: bool
) -> None:
    """Both start from the same weights, so at least one of the two must have been learned."""
    core = TokenExitCore(traces, costs, num_envs=64, lambda_range=(preference, preference))
    vec_env = CoreVecEnv(core)
    model = PPO(
        "MlpPolicy",
        vec_env,
        n_steps=16,
        batch_size=1024,
        n_epochs=4,
        learning_rate=5e-3,
        gamma=1.0,
        gae_lambda=1.0,
        seed=0,
        device="cpu",
    )
    model.learn(64 * 16 * 15)
    actions, _ = model.predict(vec_env.reset(), deterministic=True)
    assert np.mean(actions == leaves) > 0.9


def test_every_info_is_a_dict_of_its_own(vec_env: CoreVecEnv) -> None:
    vec_env.reset()
    for _ in range(3):
        *_, infos = vec_env.step(np.zeros(ENVS, np.int64))
        assert len({id(info) for info in infos}) == ENVS
        for info in infos:
            info["mine"] = True
    *_, infos = vec_env.step(np.zeros(ENVS, np.int64))
    assert not any("mine" in info for info in infos)


def test_seeds_count_from_the_next_reset_and_only_once(vec_env: CoreVecEnv) -> None:
    vec_env.seed(4)
    first = vec_env.reset()
    second = vec_env.reset()
    vec_env.seed(4)
    np.testing.assert_array_equal(first, vec_env.reset())
    assert not np.array_equal(first, second)


def test_options_set_the_first_episodes_only(vec_env: CoreVecEnv, traces: TokenTraces) -> None:
    vec_env.set_options([{"token": token, "lambda": 0.5} for token in range(ENVS)])
    np.testing.assert_array_equal(vec_env.reset()[:, :-1], traces.features_NEF[:ENVS, 0])
    assert not np.array_equal(vec_env.reset()[:, :-1], traces.features_NEF[:ENVS, 0])
    vec_env.set_options([{"token": 1}] + [{}] * (ENVS - 1))
    with pytest.raises(ConfigError, match="differ in their names"):
        vec_env.reset()


def test_attributes_are_shared_and_cannot_be_set(vec_env: CoreVecEnv) -> None:
    assert vec_env.get_attr("render_mode", [0, 3]) == [None, None]
    assert vec_env.get_attr("num_envs", 2) == [ENVS]
    assert not vec_env.has_attr("no_such_thing")
    assert vec_env.env_is_wrapped(Monitor) == [False] * ENVS
    with pytest.raises(AttributeError, match="share one environment"):
        vec_env.set_attr("render_mode", None)
    with pytest.raises(AttributeError, match="no method of an episode"):
        vec_env.env_method("anything", indices=[0])
    vec_env.close()
