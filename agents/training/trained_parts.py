"""What families of policies are placed from: each part is trained once, when first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from offramp.agents.learning.export import Weights
from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.phat import fit_state_phat, train_phat
from offramp.agents.learning.ppo import TrainedAgent, train_ppo
from offramp.agents.onpolicy.learner import Learner
from offramp.agents.placing.chase import StateTable
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.onpolicy_phase import go_on_policy
from offramp.agents.training.staged import StagedRun
from offramp.agents.training.train_config import TrainConfig

Progress = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""


class TrainedParts:
    """Agents and classifiers of one training run.

    Args:
        config: Settings of the run, seeds in place.
        data: What it learns from.
        staged: The staged training of the jumping agent; None where no family needs it.
        on_progress: Told as training advances.

    Attributes:
        placed: Contenders of the families that were placed so far, by family.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        staged: StagedRun | None = None,
        on_progress: Progress = lambda *_: None,
    ) -> None:
        self.config = config
        self.data = data
        self.staged = staged
        self.on_progress = on_progress
        self.placed: dict[str, list[Contender]] = {}

    @property
    def is_finished(self) -> bool:
        """Whether a staged run has nothing left to do, and its policies lie in its folder."""
        return self.staged is not None and self.staged.finished

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
        if self.staged is not None:
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
        assert self.staged is not None, "a family that is not staged asks for the staged agent"
        return self.staged.train()

    @cached_property
    def learner(self) -> Learner:
        """The jumping agent after its on-policy rounds, for which Ray must be up."""
        assert self.staged is not None, "a family that is not staged asks for the staged agent"
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
