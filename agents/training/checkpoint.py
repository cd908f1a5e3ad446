"""Checkpoints of a training run: enough to go on as if it had never stopped.

No generator's state is kept: before each segment between two checkpoints every generator (torch's,
numpy's, the environment's) is seeded from the run's seed and the number of the segment.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

CHECKPOINT = "checkpoint.pt"

Stage = Literal["warm", "ppo", "onpolicy", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
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

    settings: dict[str, Any]
    stage: Stage
    step: int
    phat: list[list[torch.Tensor]]
    actor: dict[str, torch.Tensor]
    optimiser: dict[str, Any]
    updates: int = 0

    def save(self, folder: Path) -> None:
        """Replace the folder's checkpoint durably.

        Raises:
            OSError: the folder cannot be written; the old checkpoint is untouched.
        """
        buffer = io.BytesIO()
        torch.save({name: getattr(self, name) for name in self.__slots__}, buffer)
        write_durably(folder / CHECKPOINT, buffer.getvalue())

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read the folder's checkpoint.

        Raises:
            ConfigError: there is none, or it is damaged (field ``resume``).
        """
        path = folder / CHECKPOINT
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("no zip archive, which torch.save writes")
            # weights_only: a checkpoint from elsewhere must not run code.
            return cls(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # torch's unpickler raises whatever the bytes lead it to
            raise ConfigError(
                "resume",
                f"{path} is missing or is no checkpoint of `offramp train`",
                "Leave --resume out to start anew in an empty folder",
            ) from error

    def require(self, settings: dict[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            ConfigError: the first setting that differs is the field.
        """
        for name, value in settings.items():
            old = self.settings.get(name)
            if old != value:
                raise ConfigError(
                    name,
                    f"is {value}, and {old} in the checkpoint",
                    "Give the old value, or a new --out without --resume",
                )


def segment_seed(seed: int, stage: str, number: int) -> int:
    """Seed of all generators in one segment of a stage, below 2³²."""
    words = [seed, *stage.encode(), number]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
