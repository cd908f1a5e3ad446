"""Training, export and placement of policies, on synthetic data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.learning.export import Normaliser, ppo_weights
from offramp.agents.learning.phat import PhatConfig, logit, train_phat
from offramp.agents.learning.ppo import PPOConfig, TrainedAgent, observation_normaliser, train_ppo
from offramp.agents.placing.contenders import load_contenders, save_contenders
from offramp.agents.placing.replay import replay, walk
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.families import place_all
from offramp.agents.training.train_config import GATE_FAMILIES, TrainConfig
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.envs import TokenExitCore

PPO_CONFIG = PPOConfig(steps=60_000, envs=256, batch=2048, lambda_range=(0.05, 2.0))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def agent(data: TrainingData) -> TrainedAgent:
    return train_ppo(data.train, data.costs, PPO_CONFIG)


def test_exported_decisions_equal_sb3_predict_on_every_observation(
    data: TrainingData, agent: TrainedAgent
) -> None:
    features_MF = data.validation.features_NEF.reshape(-1, CANDIDATES_V1.width)
    leaves = []
    for preference in (0.05, 0.3, 2.0):
        weights = ppo_weights(agent.model, agent.normaliser, preference)
        policy = MlpPolicy((2,), CANDIDATES_V1, weights)
        column = np.full((len(features_MF), 1), np.log(preference), np.float32)
        observations = np.concatenate([features_MF, column], axis=1)
        actions, _ = agent.model.predict(observations, deterministic=True)
        np.testing.assert_array_equal(policy.leave(features_MF), actions == 1)
        leaves.append(actions.mean())
    assert leaves[0] < leaves[-1]  # dearer time, more exits: the preference is really read
    assert 0.02 < leaves[1] < 0.98  # and neither action is the only one


def test_folding_equals_normalising_first() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(3, 5, size=(50, 4)).astype(np.float32)
    weight = rng.normal(size=(4, 6)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    normaliser = Normaliser.fit(rows)
    folded_weight, folded_bias = normaliser.fold(weight, bias)
    expected = (rows - normaliser.mean_F) / normaliser.std_F @ weight + bias
    np.testing.assert_allclose(rows @ folded_weight + folded_bias, expected, atol=1e-4)


def test_the_preference_is_normalised_as_a_uniform_draw(data: TrainingData) -> None:
    low, high = 0.02, 2.0
    draws = np.log(low) + np.random.default_rng(0).random(200_000) * np.log(high / low)
    normaliser = observation_normaliser(data.train, (low, high))
    assert normaliser.mean_F[-1] == pytest.approx(draws.mean(), abs=0.02)
    assert normaliser.std_F[-1] == pytest.approx(draws.std(), abs=0.02)


def test_the_classifier_is_calibrated(data: TrainingData) -> None:
    weights = train_phat(data.train, PhatConfig(epochs=30))
    policy = MlpPolicy((2,), CANDIDATES_V1, weights)
    features_MF = data.validation.features_NEF.reshape(-1, CANDIDATES_V1.width)
    logits = np.concatenate([policy.logits(part).copy() for part in np.split(features_MF, 6)])
    probability = 1 / (1 + np.exp(-logits))
    right = data.validation.agree_NE.reshape(-1)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        chosen = (probability >= low) & (probability < low + 0.2)
        gap = abs(probability[chosen].mean() - right[chosen].mean())
        assert gap < 3 * 0.5 / np.sqrt(chosen.sum()) + 0.03, low


def test_same_seed_same_policy_bytes(data: TrainingData) -> None:
    def blobs(seed: int) -> list[bytes]:
        config = replace(PPO_CONFIG, steps=8_000, seed=seed)
        phat = train_phat(data.train, PhatConfig(epochs=1, seed=seed))
        trained = train_ppo(data.train, data.costs, config)
        rows = data.validation.features_NEF[:32, 0]
        weights = (phat, ppo_weights(trained.model, trained.normaliser, 0.3))
        return [pack_policy(MlpPolicy((2,), CANDIDATES_V1, w), rows).blob for w in weights]

    first, again, other = blobs(0), blobs(0), blobs(1)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_replay_takes_the_exits_that_the_environment_would(
    data: TrainingData, agent: TrainedAgent
) -> None:
    """Independent loop: step the core with the policy's own decisions."""
    preference = 0.3
    weights = ppo_weights(agent.model, agent.normaliser, preference)
    policy = MlpPolicy((2, 4, 6), CANDIDATES_V1, weights)
    taken = walk(policy, data.validation).taken_N
    rows = np.arange(200)
    core = TokenExitCore(
        data.validation,
        data.costs,
        num_envs=len(rows),
        quality="agreement",
        lambda_range=(preference, preference),
        autoreset=False,
    )
    observation = core.reset(0, tokens=rows)
    ended = np.full(len(rows), -1)
    cost = np.zeros(len(rows))
    for _ in range(3):
        actions = policy.leave(np.ascontiguousarray(observation[:, :-1])).astype(np.int64)
        step = core.step(actions)
        for place, layer, price in zip(
            step.finals.place_K,
            step.finals.info["exit_layer"],
            step.finals.info["cost"],
            strict=True,
        ):
            if ended[place] < 0:
                ended[place], cost[place] = layer, price
        observation = step.obs_BD
    layers = np.asarray([2, 4, 6, 8])[taken[rows]]
    np.testing.assert_array_equal(ended, layers)


def test_replay_of_fixed_policies_is_known_in_closed_form(data: TrainingData) -> None:
    full = replay(NeverExit(), data.validation, data.costs)
    assert (full.agreement, full.mean_layers) == (1.0, 8.0)
    early = replay(FixedExit(4), data.validation, data.costs)
    assert early.agreement == pytest.approx(data.validation.agree_NE[:, 1].mean())
    assert early.mean_layers == 4.0
    with pytest.raises(ConfigError, match="exits"):
        replay(FixedExit(5), data.validation, data.costs)


def test_contenders_are_placed_saved_and_read_back(
    data: TrainingData, agent: TrainedAgent, tmp_path: Path
) -> None:
    phat = train_phat(data.train, PhatConfig(epochs=5))
    targets = (0.85, 0.95)
    config = TrainConfig(traces="unread", targets=targets, gate=PPO_CONFIG)
    parts = TrainedParts(config, data, Path("unused"))
    parts.phat, parts.gate = phat, agent
    contenders = place_all(GATE_FAMILIES, parts)
    assert contenders[0].setting is None
    families = [c.family for c in contenders]
    assert families.count("p̂") == families.count("PPO") == 2
    for contender in contenders:
        if contender.family == "p̂":
            assert min(abs((contender.offline_agreement or 0) - t) for t in targets) < 0.03
    save_contenders(tmp_path, contenders, data, {"seed": 0})
    again = load_contenders(tmp_path)
    assert [c.name for c in again] == [c.name for c in contenders]
    for before, after in zip(contenders, again, strict=True):
        np.testing.assert_array_equal(
            walk(before.policy, data.validation).taken_N,
            walk(after.policy, data.validation).taken_N,
        )


def test_missing_policies_and_bad_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policies"):
        load_contenders(tmp_path)
    with pytest.raises(ConfigError, match="targets"):
        TrainConfig(traces="unread", targets=(0.9, 1.0))


def test_logit_inverts_the_logistic() -> None:
    for probability in (0.01, 0.5, 0.93):
        assert 1 / (1 + np.exp(-logit(probability))) == pytest.approx(probability)
