"""Checkpoints of a training run: enough to go on as if it had never stopped.

No generator's state is kept: before each segment between two checkpoints every generator (torch's,
numpy's, the environment's) is seeded from the run's seed and the number of the segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from offramp.agents.training.resuming import Resumable

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
