"""What families of policies are placed from: each part is trained once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from offramp.agents.learning.export import Weights
from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.phat import fit_state_phat, train_phat
from offramp.agents.learning.ppo import TrainedAgent, train_ppo
from offramp.agents.onpolicy.learner import Learner
from offramp.agents.placing.contenders import Contender
from offramp.agents.placing.state_replay import StateTable
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.onpolicy_phase import go_on_policy
from offramp.agents.training.staged import StagedRun, with_seeds
from offramp.agents.training.train_config import TrainConfig

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""


class TrainedParts:
    """Agents and classifiers of one training run.

    Args:
        config: Settings of the run.
        data: What it learns from.
        out: Folder of checkpoints and scalars, for families that are trained in stages.
        on_progress: Told as training advances.
        callback: One of SB3's or a user's, for the staged PPO.

    Attributes:
        placed: Contenders of the families that were placed so far, by family.
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
        self.placed: dict[str, list[Contender]] = {}

    @cached_property
    def staged(self) -> StagedRun:
        """The jumping agent's training, at its beginning until it is restored or run."""
        return StagedRun(self.config, self.data, self.out, self.on_progress, self.callback)

    @property
    def has_stages(self) -> bool:
        """Whether some family, or a checkpoint, has asked for the staged training."""
        return "staged" in vars(self)

    @property
    def is_finished(self) -> bool:
        """Whether a restored run has nothing left to do, and its policies lie in its folder."""
        return self.has_stages and self.staged.finished

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers that were recorded."""
        return self.data.train.header.exits

    @property
    def targets(self) -> tuple[float, ...]:
        """Offline agreements at which every family gets a point."""
        return self.config.targets

    @cached_property
    def phat(self) -> Weights:
        """p̂ on the recorded exits, each probed after the one before."""
        if self.has_stages:  # whose checkpoints hold it
            self.staged.train()
            return self.staged.phat
        return train_phat(self.data.train, self.config.phat)

    @cached_property
    def gate(self) -> TrainedAgent:
        """The PPO agent that leaves or goes on to the next exit."""
        return train_ppo(
            self.data.train,
            self.data.costs,
            self.config.gate,
            lambda *count: self.on_progress("PPO", *count),
        )

    @cached_property
    def jumps(self) -> JumpAgent:
        """The PPO agent that says at which exit it is asked next."""
        return self.staged.train()

    @cached_property
    def learner(self) -> Learner:
        """The jumping agent after its on-policy rounds, for which Ray must be up."""
        self.staged.train()
        return go_on_policy(self.staged, lambda *count: self.on_progress("on-policy", *count))

    @cached_property
    def state_phat(self) -> Weights:
        """p̂ in every state that jumps can reach, so that any subset of exits may be asked at."""
        return fit_state_phat(self.data.train, self.config.phat)

    @cached_property
    def states(self) -> StateTable:
        """The validation tokens in every state that jumps can reach."""
        return StateTable(self.data.validation, self.data.costs)
