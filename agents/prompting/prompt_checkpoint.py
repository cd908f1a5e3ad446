"""What a lesson on prompts has measured and learned so far, to go on from when it was cut off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from offramp.agents.learning.export import Weights
from offramp.agents.prompting.prompt_meter import Readings
from offramp.agents.training.resuming import Resumable


@dataclass(slots=True, kw_only=True)
class PromptCheckpoint(Resumable):
    """A lesson between two of its parts.

    Attributes:
        settings: Whatever changes the result, as JSON values.
        prices: Seconds per token and layer of a layer and of its keys and values; empty before
            they were measured.
        readings: Losses and calls of prompts, as tensors, by split and policy.
        agents: Layers (weight, bias) of each policy that was trained, by its seed.
    """

    command: ClassVar[str] = "offramp train --for prompts"

    settings: dict[str, Any]
    prices: dict[str, float] = field(default_factory=dict)
    readings: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    agents: dict[str, list[list[torch.Tensor]]] = field(default_factory=dict)

    def keep_readings(self, name: str, found: Readings) -> None:
        """Remember what came of some prompts."""
        self.readings[name] = [torch.from_numpy(each) for each in (found.losses_N, found.calls_N)]

    def readings_of(self, name: str) -> Readings | None:
        """What came of some prompts; None if they were not read yet."""
        if name not in self.readings:
            return None
        losses, calls = (each.numpy() for each in self.readings[name])
        return Readings(losses_N=losses, calls_N=calls)

    def keep_agent(self, seed: int, weights: Weights) -> None:
        """Remember what was trained with a seed."""
        self.agents[str(seed)] = [[torch.from_numpy(part) for part in layer] for layer in weights]

    def agent_of(self, seed: int) -> Weights | None:
        """The layers that were trained with a seed; None if they were not yet."""
        if str(seed) not in self.agents:
            return None
        return [(weight.numpy(), bias.numpy()) for weight, bias in self.agents[str(seed)]]
