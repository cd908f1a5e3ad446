"""PPO that learns, with an engine that reads prompts, which of their tokens leave.

Shape suffixes: B parallel episodes, D observation columns, N decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from torch import nn

from offramp.agents.learning.ppo import (
    PPOConfig,
    StepReport,
    TrainedAgent,
    feature_normaliser,
    new_ppo,
)
from offramp.controller.costs.table import CostTable
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.protocols import ExitPolicy
from offramp.envs import PrefillExitEnv, PromptSession

IMITATION_STEPS, IMITATION_BATCH, IMITATION_RATE = 1200, 512, 5e-3
"""Gradient steps after which the actor says what the start rule says but for a few decisions."""

DOUBT = 0.01
"""Share of each imitated target that is spread over both actions, so that PPO tries others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPPOConfig:
    """How a policy for prompts is trained.

    Attributes:
        ppo: Hyper-parameters; its rollout should hold a few whole prompts, since what a prompt's
            exits lose is known at its end. Its quality is not used: the environment's is.
        shown: Decisions of the start rule that the actor learns to repeat first.
    """

    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            steps=100_000,
            envs=4,
            rollout=2048,
            batch=2048,
            learning_rate=3e-4,
            lambda_range=(0.5, 0.5),
        )
    )
    shown: int = 8192


class PairedReturns(VecEnvWrapper):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Takes from each prompt's last reward the mean quality of its earlier readings.

    Prompts differ far more in what exits cost them than policies do. The baseline depends on no
    decision of the present episode, so the gradient's expectation stays what it was.
    """

    def reset(self) -> FloatArray:
        """Start B episodes, [B, D]; what is known of prompts stays known."""
        self._sums: dict[int, tuple[int, float]] = getattr(self, "_sums", {})
        obs_BD: FloatArray = self.venv.reset()
        return obs_BD

    def step_wait(self) -> tuple[FloatArray, FloatArray, BoolArray, list[dict[str, Any]]]:
        """As the vector's, with rewards relative to the prompt's earlier quality."""
        obs_BD, reward_B, done_B, infos = self.venv.step_wait()
        for place in np.flatnonzero(done_B).tolist():
            info = infos[place]
            reward_B[place] -= self._expected(info["prompt"]) / (1 + info["lambda"])
            times, total = self._sums.get(info["prompt"], (0, 0.0))
            self._sums[info["prompt"]] = times + 1, total + info["quality"]
        return obs_BD, reward_B, done_B, infos

    def _expected(self, prompt: int) -> float:
        """Mean quality of the prompt's earlier readings; of all prompts', at the first."""
        known = [self._sums[prompt]] if prompt in self._sums else list(self._sums.values())
        times = sum(each[0] for each in known)
        return sum(each[1] for each in known) / times if times else 0.0


def train_prompt_policy(
    open_session: Callable[[], PromptSession],
    costs: CostTable,
    start: ExitPolicy,
    config: PromptPPOConfig,
    on_steps: Callable[[int, int], None] = lambda *_: None,
) -> TrainedAgent:
    """Train Stable-Baselines3's PPO on ``offramp/PrefillExit-v0``, from a rule that it imitates.

    ``TrainedAgent.weights`` gives the layers of an ``MlpPolicy`` over PROMPT_V1.

    Args:
        open_session: Gives a session for each parallel episode.
        costs: Measured costs of the sessions' model.
        start: The rule to begin with, with the sessions' exits among its own.
        config: Hyper-parameters of the run.
        on_steps: Told (steps done, steps in all) after each rollout.
    """
    ppo = config.ppo

    def open_env() -> PrefillExitEnv:
        return PrefillExitEnv(open_session=open_session, costs=costs, lambda_range=ppo.lambda_range)

    many = DummyVecEnv([open_env] * ppo.envs)
    try:
        obs_ND, leave_N = _shown(many, start, config)
        normaliser = feature_normaliser(obs_ND[:, :-1], ppo.lambda_range)
        model = new_ppo(PairedReturns(many), normaliser, ppo)
        _imitate(model, obs_ND, leave_N, ppo.seed)
        model.learn(ppo.steps, callback=StepReport(on_steps, ppo.steps))
    finally:
        many.close()
    return TrainedAgent(model, normaliser)


def _shown(
    many: DummyVecEnv, rule: ExitPolicy, config: PromptPPOConfig
) -> tuple[FloatArray, BoolArray]:
    """What is observed where the rule decides, [N, D], and whether tokens leave, [N]."""
    many.seed(config.ppo.seed)
    obs_BD = many.reset()
    seen, said = [], []
    for _ in range(max(1, config.shown // many.num_envs)):
        leave_B = rule.leave(obs_BD[:, :-1]).copy()
        seen.append(obs_BD.copy())
        said.append(leave_B)
        obs_BD = many.step(leave_B.astype(np.int64))[0]
    return np.concatenate(seen), np.concatenate(said)


def _imitate(model: Any, obs_ND: FloatArray, leave_N: BoolArray, seed: int) -> None:
    """Teach a ``PPO``'s actor to decide as was shown."""
    policy = model.policy
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimiser = torch.optim.Adam(actor, lr=IMITATION_RATE)
    generator = torch.Generator().manual_seed(seed)
    obs, action = torch.from_numpy(obs_ND), torch.from_numpy(leave_N.astype(np.int64))
    for _ in range(IMITATION_STEPS):
        part = torch.randint(len(obs), (IMITATION_BATCH,), generator=generator)
        logits = policy.get_distribution(obs[part]).distribution.logits
        loss = nn.functional.cross_entropy(logits, action[part], label_smoothing=2 * DOUBT)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        optimiser.step()
