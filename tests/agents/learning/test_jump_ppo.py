"""Jumping agents: warm start, PPO, export, against the environment itself.

Shape suffixes: N tokens, S states, D observation columns, F features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.learning.jump_ppo import (
    JumpAgent,
    JumpConfig,
    new_agent,
    problem_of,
    warm_start,
)
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.stopping_problem import START, StateObservations
from offramp.agents.learning.warm import WarmConfig
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.errors import ConfigError
from offramp.controller.features import OUTLOOK_V1
from offramp.envs.cores.token_core import TokenExitCore
from support.training_sets import exact_return, trained_jumps

PREFERENCES = (0.05, 0.3, 1.0)
CONFIG = JumpConfig(
    jumps=2,
    warm=WarmConfig(steps=250, batch=256),
    ppo=PPOConfig(steps=8_192, envs=256, batch=2048, lambda_range=(0.05, 2.0), learning_rate=5e-4),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def agent(deep_data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> JumpAgent:
    return trained_jumps(deep_data, CONFIG, tmp_path_factory.mktemp("jumps"))


def mean_return(agent: JumpAgent, deep_data: TrainingData, preference: float) -> float:
    problem = problem_of(agent, deep_data.costs, CONFIG)
    actor = agent.model.policy
    return float(exact_return(actor, problem, deep_data.validation, "agreement", preference).mean())


def test_the_exact_value_is_the_mean_reward_of_the_environment(
    deep_data: TrainingData, agent: JumpAgent
) -> None:
    """Independent: the environment samples what the dynamic programme sums up."""
    rows = np.tile(np.arange(500), 40)
    core = TokenExitCore(
        deep_data.validation,
        deep_data.costs,
        num_envs=len(rows),
        quality="agreement",
        actions="jump",
        jumps=2,
        asks_first=True,
        autoreset=False,
    )
    obs = core.reset(0, tokens=rows, lambdas=0.3)
    total, alive = np.zeros(len(rows)), np.ones(len(rows), np.bool_)
    torch.manual_seed(0)
    for _ in range(4):
        actions, _ = agent.model.predict(obs)
        batch = core.step(np.where(alive, actions, 1))
        total += np.where(alive, batch.reward_B, 0)
        alive &= ~batch.terminated_B
        obs = batch.obs_BD
    assert not alive.any()
    problem = problem_of(agent, deep_data.costs, CONFIG)
    expected = exact_return(
        agent.model.policy, problem, deep_data.validation, "agreement", 0.3, np.arange(500)
    )
    error = (total.reshape(40, 500) - expected).mean(0)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(500)
    assert error.std() < 0.2


def test_the_warm_start_finds_more_than_any_fixed_exit(deep_data: TrainingData) -> None:
    agent = new_agent(deep_data.train, deep_data.costs, CONFIG)
    before = [mean_return(agent, deep_data, preference) for preference in PREFERENCES]
    problem = problem_of(agent, deep_data.costs, CONFIG)
    warm_start(agent, deep_data.train, deep_data.costs, CONFIG).run(CONFIG.warm.steps)
    after = [mean_return(agent, deep_data, preference) for preference in PREFERENCES]
    assert all(new > old for old, new in zip(before, after, strict=True))
    quality = deep_data.validation.quality("agreement").mean(0)
    probed = np.asarray(problem.leave_E1) + problem.decide + problem.begin  # nobody leaves unasked
    fixed = [
        ((quality - preference * probed) / (1 + preference)).max() for preference in PREFERENCES
    ]
    assert all(found > best - 0.005 for found, best in zip(after, fixed, strict=True))
    assert after[1] > fixed[1] + 0.005  # where neither extreme is right, looking pays


def test_exported_decisions_are_sb3s_in_every_recorded_state(
    deep_data: TrainingData, agent: JumpAgent
) -> None:
    problem = problem_of(agent, deep_data.costs, CONFIG)
    observations = StateObservations(deep_data.validation, problem.states)
    rows = np.arange(len(deep_data.validation))
    nothing = np.zeros((len(rows), OUTLOOK_V1.width), np.float32)
    seen: set[int] = set()
    for preference in PREFERENCES:
        router = agent.router(preference)
        log_lambda = np.full(len(rows), np.log(preference), np.float32)
        obs_NSD = observations.of(rows, log_lambda)
        for s, state in enumerate(problem.states):
            actions, _ = agent.model.predict(obs_NSD[:, s], deterministic=True)
            if state.here == START:
                assert set(actions - 1) == set(router.start(nothing).tolist())
                continue
            features = np.ascontiguousarray(obs_NSD[:, s, :-1])
            routed = router.route(state.here, features, nothing)
            np.testing.assert_array_equal(routed, state.here + actions)
            seen |= set(actions.tolist())
    assert seen == {0, 1, 2}


def test_the_same_seed_gives_the_same_router(
    deep_data: TrainingData, agent: JumpAgent, tmp_path: Path
) -> None:
    again = trained_jumps(deep_data, CONFIG, tmp_path)
    pairs = zip(agent.router(0.3).weights, again.router(0.3).weights, strict=True)
    for (weight, bias), (weight_again, bias_again) in pairs:
        np.testing.assert_array_equal(weight, weight_again)
        np.testing.assert_array_equal(bias, bias_again)


def test_jumps_beyond_the_recorded_exits_are_refused(deep_data: TrainingData) -> None:
    with pytest.raises(ConfigError, match="jumps: 9 is not from 1 to 4: 3 exits were recorded"):
        new_agent(deep_data.train, deep_data.costs, JumpConfig(jumps=9))
