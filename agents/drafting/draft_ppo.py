"""PPO on draft-and-verify episodes: tokens per measured second, as an average-reward problem.

Shape suffix: V objectives (tokens, −seconds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from offramp.agents.drafting.draft_chances import FittedChances, trusted_grid
from offramp.agents.drafting.draft_net import DraftPolicy
from offramp.agents.drafting.draft_replay import decider
from offramp.agents.drafting.draft_start import imitate
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from offramp.envs.cores.draft_core import DraftExitCore
from offramp.envs.traces.tokens import TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPPOConfig:
    """Hyper-parameters of a drafter's training.

    Attributes:
        steps: Decisions in all.
        envs: Episodes that run in parallel.
        rollout: Decisions per episode and update.
        batch: Decisions per gradient step.
        epochs: Passes over each rollout.
        learning_rate: At the start; falls linearly to 2 %.
        gae_lambda: λ of the generalised advantage estimate.
        entropy: Weight of the entropy bonus at the start; falls with the learning rate.
        hidden: Units of each hidden layer of both actor nets.
        max_pending: Drafts that may be open.
        imitated: Decisions of the best stop by trust that the actor learns to repeat first.
        rate_share: How far ρ moves to a rollout's own rate.
        seed: Seeds everything random.
    """

    steps: int = 600_000
    envs: int = 512
    rollout: int = 32
    batch: int = 4096
    epochs: int = 4
    learning_rate: float = 5e-4
    gae_lambda: float = 1.0
    entropy: float = 0.0
    hidden: tuple[int, ...] = (32, 32)
    max_pending: int = MAX_PENDING
    imitated: int = 65_536
    rate_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "envs", "rollout", "batch", "epochs", "imitated"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")
        if not 0 < self.rate_share <= 1:
            raise ConfigError("rate_share", f"{self.rate_share} is not in (0, 1]")


class _Rate(BaseCallback):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Moves ρ to what is really earned (Dinkelbach 1967, in small steps)."""

    def __init__(self, share: float, on_rate: Callable[[int, float], None]) -> None:
        super().__init__()
        self.share = share
        self.on_rate = on_rate

    def _on_rollout_start(self) -> None:
        self._earned_V = np.zeros(2)

    def _on_step(self) -> bool:
        self._earned_V += self.training_env.reward_vectors.sum(0)
        return True

    def _on_rollout_end(self) -> None:
        core = self.training_env.core
        earned = -self._earned_V[0] / self._earned_V[1]
        rate = core.rate + self.share * (earned - core.rate)
        core.set_rate(rate)
        self.logger.record("draft/rate", rate)
        self.on_rate(self.num_timesteps, rate)


def train_drafter(
    traces: TokenTraces,
    costs: CostTable,
    fitted: FittedChances,
    config: DraftPPOConfig,
    on_rate: Callable[[int, float], None] = lambda *_: None,
    candidates_VK: IntArray | None = None,
) -> Any:
    """Train Stable-Baselines3's PPO on ``offramp/DraftExit-v0``; returns the ``PPO``.

    It starts from the stop by trust that is best on the same traces (``draft_start``).

    Args:
        traces: Continuations that episodes replay.
        costs: What a token's parts cost, as measured.
        fitted: How likely these tokens are right.
        config: Hyper-parameters of the run.
        on_rate: Told (decisions so far, ρ) after each rollout.
        candidates_VK: The table of ``CandidateDrafts``.
    """
    exits, odds_NE = traces.header.exits, fitted.odds_NE
    rule = trusted_grid(fitted.chances, traces, costs, candidates_VK, config.max_pending, odds_NE)[
        0
    ]
    core = DraftExitCore(
        traces, costs, num_envs=config.envs, max_pending=config.max_pending, odds=odds_NE
    )
    model = PPO(
        DraftPolicy,
        CoreVecEnv(core),
        n_steps=config.rollout,
        batch_size=config.batch,
        n_epochs=config.epochs,
        learning_rate=lambda left: config.learning_rate * max(left, 0.02),
        gamma=1.0,
        gae_lambda=config.gae_lambda,
        clip_range=0.2,
        ent_coef=config.entropy,
        seed=config.seed,
        device="cpu",
        policy_kwargs={"nets": {"exits": len(exits), "hidden": config.hidden}},
    )
    shown = decider(rule.policy, exits)
    imitate(model, core, shown, decisions=config.imitated, seed=config.seed)
    core.set_rate(rule.offline.rate)
    model.learn(config.steps, callback=_Rate(config.rate_share, on_rate))
    return model
