"""Warm start: an actor trained on the exact gradient of its expected return.

Shape suffixes: N tokens, S states, A actions, D observation columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offramp.agents.learning.actor import JumpActor
from offramp.agents.learning.stopping_problem import StateObservations, StoppingProblem
from offramp.controller.errors import ConfigError
from offramp.envs.traces.tokens import Quality, TokenTraces


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmConfig:
    """How the actor is warmed up.

    Attributes:
        steps: Gradient steps; 0 leaves the actor as it was drawn.
        batch: Tokens per step, each in all states.
        learning_rate: Adam's at the start; it falls linearly to 2 % of this.
        everywhere: Weight, at the start, of the mean value of all states beside the value of the
            first; it falls linearly to 0. A state that is hardly ever reached has hardly any
            gradient, and what is not worth reaching depends on how one would act there.
        critic: Weight of the critic's loss (squared error to the exact values).
    """

    steps: int = 500
    batch: int = 256
    learning_rate: float = 5e-3
    everywhere: float = 1.0
    critic: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("everywhere", 0), ("critic", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"warm.{name}", f"{getattr(self, name)} is below {least}")


class WarmStart:
    """Ascends the exact expected return, and fits the critic to the exact values.

    What a step draws is a function of the seed and its number, so that a run may stop after any
    step and go on later with actor, optimiser and number alone.

    Args:
        actor: Trained in place.
        problem: Gives the expected return that is climbed.
        traces: Tokens to train on.
        quality: How an exit's token is scored.
        lambda_range: Preferences are drawn log-uniformly, one per token.
        config: Hyper-parameters of the warm start.
        seed: Seeds which tokens and preferences are drawn.

    Attributes:
        step: Gradient steps done so far.
        optimiser: Adam over all parameters of the actor.
    """

    def __init__(
        self,
        actor: JumpActor,
        problem: StoppingProblem,
        traces: TokenTraces,
        quality: Quality,
        lambda_range: tuple[float, float],
        config: WarmConfig,
        seed: int,
    ) -> None:
        self.actor = actor
        self.problem = problem
        self.config = config
        self.step = 0
        self.optimiser = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
        self._seed = seed
        self._observations = StateObservations(traces, problem.states)
        self._quality_NE1 = torch.from_numpy(traces.quality(quality))
        self._log_range = (math.log(lambda_range[0]), math.log(lambda_range[1]))

    def run(self, until: int) -> float:
        """Step up to a number of steps, at most ``config.steps``; the last mean return."""
        expected = 0.0
        for step in range(self.step, min(until, self.config.steps)):
            left = 1 - step / self.config.steps
            for group in self.optimiser.param_groups:
                group["lr"] = self.config.learning_rate * max(left, 0.02)
            loss, expected = self._loss(step, left)
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            self.optimiser.step()
            self.step = step + 1
        return expected

    def _loss(self, step: int, left: float) -> tuple[Tensor, float]:
        rng = np.random.default_rng([self._seed, step])
        size = self.config.batch
        rows_N = rng.integers(len(self._quality_NE1), size=size)
        log_lambda_N = rng.uniform(*self._log_range, size=size).astype(np.float32)
        obs_NSD = torch.from_numpy(self._observations.of(rows_N, log_lambda_N))
        lambda_N = torch.from_numpy(np.exp(log_lambda_N))
        log_pi_NSA = log_chances(self.actor, obs_NSD)
        values_NS = self.problem.values(log_pi_NSA, self._quality_NE1[rows_N], lambda_N)
        share_N1 = (lambda_N / (1 + lambda_N))[:, None]
        target_NS = values_NS.detach() + share_N1 * self.problem.paid_S()
        flat = obs_NSD.reshape(-1, obs_NSD.shape[2])
        predicted_NS = self.actor.predict_values(flat).reshape(target_NS.shape)
        error = nn.functional.mse_loss(predicted_NS, target_NS)
        first, every = values_NS[:, 0].mean(), values_NS.mean()
        loss = self.config.critic * error - first - self.config.everywhere * left * every
        return loss, float(first.detach())


def log_chances(actor: JumpActor, obs_NSD: Tensor) -> Tensor:
    """Log-probabilities of the actions in each state, [N, S, A]."""
    flat = obs_NSD.reshape(-1, obs_NSD.shape[2])
    return actor.logits(flat).log_softmax(-1).reshape(*obs_NSD.shape[:2], -1)
