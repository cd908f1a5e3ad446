"""Checkpoints of a tuning run: enough to go on as if it had never stopped.

Nothing in a run draws random numbers after its start: the order of the documents is a function of
the seed and the pass (see ``stream``), so the stream's position stands for the generator's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from offramp.agents.training.resuming import Resumable


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint(Resumable):
    """A run between two steps.

    Attributes:
        settings: Whatever changes the result: fingerprint, data digest and options, as JSON.
        step: Steps done.
        modules: State of each translator, by layer.
        optimizer: Its state.
        position: Of the stream.
        curve: Training KL so far: step, then each exit's, nats.
    """

    command: ClassVar[str] = "offramp tune"

    settings: dict[str, Any]
    step: int
    modules: dict[int, dict[str, torch.Tensor]]
    optimizer: dict[str, Any]
    position: dict[str, Any]
    curve: list[list[float]]
