"""The jumping agent, trained in stages with checkpoints: p̂, warm start, PPO.

A checkpoint is enough to go on as if the run had never stopped. No generator's state is kept:
before each segment between two checkpoints every generator (torch's, numpy's, the environment's)
is seeded from the run's seed and the number of the segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger, configure

from offramp.agents.learning.export import Weights
from offramp.agents.learning.jump_ppo import JumpAgent, new_agent, problem_of, warm_start
from offramp.agents.learning.phat import train_phat
from offramp.agents.learning.ppo import learning_rate
from offramp.agents.placing.contenders import INDEX
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.resuming import FRESH, Resumable, segment_seed
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.errors import ConfigError

WARM_STEPS = 100
"""Steps between checkpoints of the warm start, times ``checkpoint_every``."""

PLACES = ("traces", "costs", "translators", "tensorboard", "onpolicy", "families", "gate")
"""Settings that do not change what the stages before the on-policy one come to."""

ONPOLICY_PLACES = ("rounds", "collectors", "model", "corpus")
"""Settings of the on-policy stage that may change between its rounds."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""

Stage = Literal["warm", "ppo", "onpolicy", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Resumable):
    """A run between two segments.

    Attributes:
        settings: Whatever changes the result, as JSON values.
        stage: What is under way.
        step: Steps of that stage done; rounds, of the on-policy stage and when all is done.
        phat: The classifier's layers, as tensors (weight, bias).
        actor: State of SB3's policy.
        optimiser: State of the stage's Adam.
        updates: SB3's count of gradient passes.
        learner: State of the on-policy stage's learner; empty before its first round.
    """

    command: ClassVar[str] = "offramp train"

    settings: dict[str, Any]
    stage: Stage
    step: int
    phat: list[list[torch.Tensor]]
    actor: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    updates: int = 0
    learner: dict[str, Any] = field(default_factory=dict)


class StagedRun:
    """One run: where it stands, and how it goes on.

    Args:
        config: Settings of the run.
        data: What it learns from.
        out: Where checkpoints and scalars go.
        on_progress: Told as it advances.
        callback: One of SB3's or a user's (Weights & Biases, MLflow), for the PPO stage.

    Attributes:
        agent: The jumping agent, as far as it is trained.
        phat: The classifier's layers.
        stage, step: What is under way, and how far.
        learner: State of the on-policy stage's learner; empty before its first round.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        out: Path,
        on_progress: Progress = lambda *_: None,
        callback: BaseCallback | None = None,
    ) -> None:
        self.config = with_seeds(config)
        self.data = data
        self.out = out
        self.on_progress = on_progress
        self.callback = callback
        self.stage: Stage = "warm"
        self.step = 0
        self.learner: dict[str, Any] = {}
        self.phat: Weights = []
        self.agent: JumpAgent = new_agent(data.train, data.costs, self.config.jump)
        self._warm = warm_start(self.agent, data.train, data.costs, self.config.jump)
        self._optimiser: torch.optim.Optimizer = self._warm.optimiser

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint was written.

        Raises:
            ConfigError: it is of other settings, or has more on-policy rounds than are wanted.
        """
        checkpoint.require(self._settings())
        if checkpoint.learner:
            self._require_rounds(checkpoint)
        self.stage, self.step = checkpoint.stage, checkpoint.step
        self.learner = checkpoint.learner
        self.phat = [(weight.numpy(), bias.numpy()) for weight, bias in checkpoint.phat]
        self.agent.model.policy.load_state_dict(checkpoint.actor)
        if self.stage != "warm":
            self._optimiser = self.agent.model.policy.optimizer
        self._optimiser.load_state_dict(checkpoint.optimiser)
        self._warm.step = self.step if self.stage == "warm" else self.config.jump.warm.steps
        self.agent.model._n_updates = checkpoint.updates

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all rounds are done, and the policies lie there."""
        rounds = self.config.onpolicy.rounds
        return (self.stage, self.step) == ("done", rounds) and (self.out / INDEX).exists()

    def finish(self) -> None:
        """Note that nothing is left to be done, and write a checkpoint."""
        self.reach("done", self.config.onpolicy.rounds)

    def reach(self, stage: Stage, step: int, learner: dict[str, Any] | None = None) -> None:
        """Stand at a step of a stage, and write the checkpoint.

        Args:
            stage, step: Stage that is under way, and steps of it that are done.
            learner: The learner's new state, if it has one.

        Raises:
            ConfigError: it cannot be written; the one before is whole, and can be resumed.
        """
        self.stage, self.step = stage, step
        self.learner = learner or self.learner
        self._save()

    def train(self) -> JumpAgent:
        """Go through the stages on traces that are left; a checkpoint after each segment.

        Raises:
            ConfigError: a checkpoint cannot be written; the one before is whole, and can be
                resumed.
        """
        if self.stage not in ("warm", "ppo"):
            return self.agent
        if not self.phat:
            self._save()  # from here on there is something to resume
            self.phat = train_phat(self.data.train, self.config.phat)
            self._save()
        logger = self._logger()
        if self.stage == "warm":
            self._warm_up(logger)
        if self.stage == "ppo":
            self._improve(logger)
        return self.agent

    def _warm_up(self, logger: Logger) -> None:
        total = self.config.jump.warm.steps
        while self._warm.step < total:
            expected = self._warm.run(self._warm.step + WARM_STEPS)
            self.step = self._warm.step
            logger.record("warm/return", expected)
            logger.dump(self.step)
            self.on_progress("warm", self.step, total)
            if self.step % (WARM_STEPS * self.config.checkpoint_every) == 0:
                self._save()
        self._optimiser = self.agent.model.policy.optimizer
        self.reach("ppo", 0)

    def _improve(self, logger: Logger) -> None:
        """SB3's own loop, segment by segment."""
        model, ppo = self.agent.model, self.config.jump.ppo
        model.set_logger(logger)
        total = ppo.steps
        model.lr_schedule = lambda _: learning_rate(ppo, model.num_timesteps / total)
        model.num_timesteps = self.step
        size = ppo.envs * ppo.rollout * self.config.checkpoint_every
        while self.step < total:
            model.set_random_seed(segment_seed(self.config.seed, "ppo", self.step // size))
            model._last_obs = None  # so that the environment begins anew, from its new seed
            model.learn(
                min(size, total - self.step), callback=self.callback, reset_num_timesteps=False
            )
            self.step = model.num_timesteps
            self.on_progress("ppo", min(self.step, total), total)
            self._save()
        self.reach("onpolicy", 0)

    def _save(self) -> None:
        Checkpoint(
            settings={**self._settings(), **self._onpolicy_settings()},
            stage=self.stage,
            step=self.step,
            phat=[[torch.from_numpy(w), torch.from_numpy(b)] for w, b in self.phat],
            actor=self.agent.model.policy.state_dict(),
            optimiser=self._optimiser.state_dict(),
            updates=self.agent.model._n_updates,
            learner=self.learner,
        ).save(self.out)

    def _settings(self) -> dict[str, Any]:
        options = asdict(self.config)
        facts = {
            "model": self.data.facts.model,
            "tokens": len(self.data.train),
            "prices": list(self._prices()),
        }
        kept = {k: v for k, v in options.items() if k not in PLACES}
        return {**kept, **facts}

    def _onpolicy_settings(self) -> dict[str, Any]:
        options = asdict(self.config.onpolicy)
        return {f"onpolicy.{k}": v for k, v in options.items() if k not in ONPOLICY_PLACES}

    def _require_rounds(self, checkpoint: Checkpoint) -> None:
        checkpoint.require(self._onpolicy_settings())
        rounds = self.config.onpolicy.rounds
        if rounds < checkpoint.step:
            raise ConfigError(
                "onpolicy.rounds", f"is {rounds}, and {checkpoint.step} are done", FRESH
            )

    def _prices(self) -> tuple[float, ...]:
        problem = problem_of(self.agent, self.data.costs, self.config.jump)
        return (*problem.leave_E1, problem.decide, problem.build)

    def _logger(self) -> Logger:
        if not self.config.tensorboard:
            return configure(None, [])
        return configure(str(self.out / "tensorboard"), ["tensorboard"])


def with_seeds(config: TrainConfig) -> TrainConfig:
    """Give every stage the run's seed."""
    seed = config.seed
    learner = replace(config.onpolicy.learner, seed=seed)
    return replace(
        config,
        phat=replace(config.phat, seed=seed),
        gate=replace(config.gate, seed=seed),
        jump=replace(config.jump, ppo=replace(config.jump.ppo, seed=seed)),
        onpolicy=replace(config.onpolicy, learner=learner),
    )
