"""PPO over replayed traces: one small net for every preference λ.

Shape suffixes: N rows, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from offramp.agents.learning.actor import PI, VF, Normalised
from offramp.agents.learning.export import Normaliser, Weights, ppo_weights
from offramp.controller.costs.table import CostTable
from offramp.controller.features import FloatArray
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.cores.token_core import TokenExitCore
from offramp.envs.traces.tokens import Quality, TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """How the agent is trained.

    Attributes:
        steps: Environment steps in all.
        envs: Episodes that run in parallel.
        rollout: Steps per environment between updates.
        batch: Rows per gradient step.
        epochs: Passes over each rollout.
        learning_rate: At the start; it falls linearly to 2 % of this.
        entropy: Weight of the entropy bonus.
        lambda_range: Preferences drawn per episode, log-uniformly.
        quality: How an exit's token is scored.
        seed: Seeds the environment, the initial weights and the actions.
    """

    steps: int = 1_500_000
    envs: int = 2048
    rollout: int = 16
    batch: int = 8192
    epochs: int = 4
    learning_rate: float = 2e-3
    entropy: float = 0.0
    lambda_range: tuple[float, float] = (0.02, 2.0)
    quality: Quality = "agreement"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainedAgent:
    """A PPO model and the normaliser its observations pass through."""

    model: Any
    normaliser: Normaliser

    def weights(self, preference: float) -> Weights:
        """Export the actor at one preference λ; see ``ppo_weights``."""
        return ppo_weights(self.model, self.normaliser, preference)


class StepReport(BaseCallback):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Tells (steps done, steps in all) after each rollout."""

    def __init__(self, on_steps: Callable[[int, int], None], total: int) -> None:
        super().__init__()
        self.on_steps = on_steps
        self.total = total

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.on_steps(min(self.num_timesteps, self.total), self.total)


def train_ppo(
    traces: TokenTraces,
    costs: CostTable,
    config: PPOConfig,
    on_steps: Callable[[int, int], None] = lambda *_: None,
) -> TrainedAgent:
    """Train Stable-Baselines3's PPO on ``offramp/TokenExit-v0``, vectorised.

    The preference is observed (log λ, the last column), so one net traces the whole frontier.

    Args:
        traces: Tokens that episodes replay.
        costs: What a token's parts cost, as measured.
        config: Hyper-parameters of the run.
        on_steps: Told (steps done, steps in all) after each rollout.
    """
    core = TokenExitCore(
        traces,
        costs,
        num_envs=config.envs,
        lambda_range=config.lambda_range,
        quality=config.quality,
    )
    normaliser = observation_normaliser(traces, config.lambda_range)
    model = new_ppo(CoreVecEnv(core), normaliser, config)
    model.learn(config.steps, callback=StepReport(on_steps, config.steps))
    return TrainedAgent(model, normaliser)


def new_ppo(env: VecEnv, normaliser: Normaliser, config: PPOConfig) -> Any:
    """An untrained ``PPO`` whose actor ``TrainedAgent`` exports.

    Args:
        env: Episodes with two actions: go on, leave.
        normaliser: Normalises their observations, the last column being log λ.
        config: Hyper-parameters of the run.
    """
    return PPO(
        "MlpPolicy",
        env,
        policy_kwargs={
            "net_arch": {"pi": PI, "vf": VF},
            "activation_fn": nn.Tanh,
            "features_extractor_class": Normalised,
            "features_extractor_kwargs": {"normaliser": normaliser},
        },
        **ppo_arguments(config),
    )


def learning_rate(config: PPOConfig, done: float) -> float:
    """Adam's rate once a share of the steps is done: linear, down to 2 %."""
    return config.learning_rate * max(1 - done, 0.02)


def ppo_arguments(config: PPOConfig) -> dict[str, Any]:
    """What every PPO here has in common: undiscounted episodes of few steps."""
    return {
        "n_steps": config.rollout,
        "batch_size": config.batch,
        "n_epochs": config.epochs,
        "learning_rate": lambda left: learning_rate(config, 1 - left),
        "gamma": 1.0,
        "gae_lambda": 1.0,
        "clip_range": 0.2,
        "ent_coef": config.entropy,
        "seed": config.seed,
        "device": "cpu",
    }


def observation_normaliser(traces: TokenTraces, lambda_range: tuple[float, float]) -> Normaliser:
    """Means and deviations of the observation of recorded tokens; see ``feature_normaliser``."""
    return feature_normaliser(
        traces.features_NEF.reshape(-1, traces.features_NEF.shape[2]), lambda_range
    )


def feature_normaliser(features_NF: FloatArray, lambda_range: tuple[float, float]) -> Normaliser:
    """Means and deviations of the observation: fitted features, and log λ in closed form."""
    features = Normaliser.fit(features_NF)
    low, high = (math.log(value) for value in lambda_range)
    # Mean and deviation of a uniform distribution.
    mean, std = (low + high) / 2, max((high - low) / math.sqrt(12), 1.0)
    return Normaliser(
        np.append(features.mean_F, np.float32(mean)), np.append(features.std_F, np.float32(std))
    )
