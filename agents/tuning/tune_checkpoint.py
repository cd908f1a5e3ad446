"""A tuning run between two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from offramp.agents.training.resuming import Resumable


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneCheckpoint(Resumable):
    """A run between two steps: enough to go on as if it had never stopped.

    Nothing in a run draws random numbers after its start: the order of the documents is a function
    of the seed and the pass, so the stream's position stands for a generator's state.

    Attributes:
        settings: Whatever changes the result: fingerprint, data digest and options, as JSON.
        step: How many steps are done.
        modules: State of each translator, by layer.
        optimizer: State of the optimizer.
        position: Where the stream of windows is.
        curve: Training KL so far: step, then each exit's, nats.
    """

    command: ClassVar[str] = "offramp tune"

    settings: dict[str, Any]
    step: int
    modules: dict[int, dict[str, torch.Tensor]]
    optimizer: dict[str, Any]
    position: dict[str, Any]
    curve: list[list[float]]
