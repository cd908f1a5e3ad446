"""Warm start: an actor trained on the exact gradient of its expected return.

Shape suffixes: N tokens, S states, A actions, D observation columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offramp.agents.actor import JumpActor
from offramp.agents.game import StoppingGame
from offramp.agents.observe import StateObservations
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policy import IndexArray
from offramp.envs.tokens import Quality, TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmConfig:
    """How the actor is warmed up.

    Attributes:
        steps: Gradient steps; 0 leaves the actor as it was drawn.
        batch: Tokens per step, each in all states.
        learning_rate: Of Adam, at the start; it falls linearly to 2 % of this.
        critic: Weight of the critic's loss (squared error to the exact values).
    """

    steps: int = 600
    batch: int = 512
    learning_rate: float = 5e-3
    critic: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError("warm.steps", f"{self.steps} is below 0")
        if self.batch < 1:
            raise ConfigError("warm.batch", f"{self.batch} is below 1")


def warm_start(
    actor: JumpActor,
    game: StoppingGame,
    traces: TokenTraces,
    quality: Quality,
    lambda_range: tuple[float, float],
    config: WarmConfig,
    seed: int,
    on_steps: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Ascend the exact expected return, and fit the critic to the exact values.

    Args:
        actor: Trained in place.
        game: Whose return.
        traces: Training tokens.
        quality: How an exit's token is scored.
        lambda_range: Preferences are drawn log-uniformly, one per token.
        config: How.
        seed: Of tokens and preferences.
        on_steps: Told (steps done, steps in all).
    """
    rng = np.random.default_rng(seed)
    observations = StateObservations(traces, game.states)
    quality_NE1 = torch.from_numpy(traces.quality(quality))
    optimiser = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, max(1, config.steps))
    low, high = (math.log(value) for value in lambda_range)
    for step in range(config.steps):
        rows_N = rng.integers(len(traces), size=config.batch)
        log_lambda_N = rng.uniform(low, high, size=config.batch).astype(np.float32)
        obs = torch.from_numpy(observations.of(rows_N, log_lambda_N))
        lambda_N = torch.from_numpy(np.exp(log_lambda_N))
        loss = _loss(actor, game, obs, quality_NE1[rows_N], lambda_N, config.critic)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimiser.step()
        decay.step()
        on_steps(step + 1, config.steps)


@torch.no_grad()
def exact_return(
    actor: JumpActor,
    game: StoppingGame,
    traces: TokenTraces,
    quality: Quality,
    preference: float,
    rows_N: IndexArray | None = None,
) -> FloatArray:
    """Expected return of each token under the actor's random choices, [N].

    Args:
        actor, game, traces, quality: As for ``warm_start``.
        preference: λ.
        rows_N: Tokens; None takes all.
    """
    rows_N = np.arange(len(traces)) if rows_N is None else rows_N
    observations = StateObservations(traces, game.states)
    quality_NE1 = torch.from_numpy(traces.quality(quality))
    returns = []
    for part_N in np.array_split(rows_N, -(-len(rows_N) // 2048)):
        log_lambda_N = np.full(len(part_N), math.log(preference), np.float32)
        obs = torch.from_numpy(observations.of(part_N, log_lambda_N))
        lambda_N = torch.full((len(part_N),), preference)
        log_pi = log_chances(actor, obs)
        returns.append(game.expected_return(log_pi, quality_NE1[part_N], lambda_N))
    return np.asarray(torch.cat(returns).numpy())


def log_chances(actor: JumpActor, obs_NSD: Tensor) -> Tensor:
    """Log-probabilities of the actions in each state, [N, S, A]."""
    flat = obs_NSD.reshape(-1, obs_NSD.shape[2])
    return actor.logits(flat).log_softmax(-1).reshape(*obs_NSD.shape[:2], -1)


def _loss(
    actor: JumpActor,
    game: StoppingGame,
    obs_NSD: Tensor,
    quality_NE1: Tensor,
    lambda_N: Tensor,
    critic: float,
) -> Tensor:
    values_NS = game.values(log_chances(actor, obs_NSD), quality_NE1, lambda_N)
    share_N1 = (lambda_N / (1 + lambda_N))[:, None]
    target_NS = values_NS.detach() + share_N1 * game.paid_S()
    predicted_NS = actor.predict_values(obs_NSD.reshape(-1, obs_NSD.shape[2]))
    error = nn.functional.mse_loss(predicted_NS.reshape(target_NS.shape), target_NS)
    return critic * error - values_NS[:, 0].mean()
