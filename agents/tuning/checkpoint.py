"""Checkpoints of a tuning run: enough to go on as if it had never stopped.

Nothing in a run draws random numbers after its start: the order of the documents is a function of
the seed and the pass (see ``stream``), so the stream's position stands for the generator's state.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

CHECKPOINT = "checkpoint.pt"
FRESH = "Give the old value, or a new --out without --resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run between two steps.

    Attributes:
        settings: Whatever changes the result: fingerprint, data digest and options, as JSON.
        step: Steps done.
        modules: State of each translator, by layer.
        optimizer: Its state.
        position: Of the stream.
        curve: Training KL so far: step, then each exit's, nats.
    """

    settings: dict[str, Any]
    step: int
    modules: dict[int, dict[str, torch.Tensor]]
    optimizer: dict[str, Any]
    position: dict[str, Any]
    curve: list[list[float]]

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
                f"{path} is missing or is no checkpoint of `offramp tune`",
                "Leave --resume out to start anew in an empty folder",
            ) from error

    def require(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            ConfigError: the first setting that differs is the field.
        """
        for name, value in settings.items():
            old = self.settings.get(name)
            if old != value:
                raise ConfigError(name, f"is {value}, and {old} in the checkpoint", FRESH)
