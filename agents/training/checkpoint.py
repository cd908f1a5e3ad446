"""Checkpoints of a training run: enough to go on as if it had never stopped.

No generator's state is kept: before each segment between two checkpoints every generator (torch's,
numpy's, the environment's) is seeded from the run's seed and the number of the segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from offramp.agents.resuming import Resumable

Stage = Literal["warm", "ppo", "onpolicy", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Resumable):
    """A run between two segments.

    Attributes:
        settings: Whatever changes the result, as JSON values.
        stage: What is under way.
        step: Steps of that stage done.
        phat: The classifier's layers, as tensors (weight, bias).
        actor: State of SB3's policy.
        optimiser: State of the stage's Adam.
        updates: SB3's count of gradient passes.
    """

    command: ClassVar[str] = "offramp train"

    settings: dict[str, Any]
    stage: Stage
    step: int
    phat: list[list[torch.Tensor]]
    actor: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    updates: int = 0


def segment_seed(seed: int, stage: str, number: int) -> int:
    """Seed of all generators in one segment of a stage, below 2³²."""
    words = [seed, *stage.encode(), number]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
