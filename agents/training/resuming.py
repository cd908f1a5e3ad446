"""Checkpoints: saved whole or not at all, read without running code, held to their settings."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

CHECKPOINT = "checkpoint.pt"
FRESH = "Give the old value, or a new --out without --resume"


class Resumable:
    """What the checkpoints of all runs share; each is a dataclass of tensors and plain values."""

    __slots__ = ()

    command: ClassVar[str]
    """Whose checkpoints they are."""

    settings: Mapping[str, Any]
    """Whatever changes the result, as JSON values."""

    def save(self, folder: Path) -> None:
        """Replace the folder's checkpoint durably.

        Raises:
            ConfigError: it cannot be written (field ``out``: permission, full disk); the old
                checkpoint is untouched.
        """
        path, buffer = folder / CHECKPOINT, io.BytesIO()
        torch.save({each.name: getattr(self, each.name) for each in fields(self)}, buffer)  # type: ignore[arg-type]  # every subclass is a dataclass
        try:
            write_durably(path, buffer.getvalue())
        except OSError as error:
            onward = "--resume goes on from the last checkpoint" if path.exists() else "start again"
            raise ConfigError(
                "out",
                f"{path} cannot be written ({error.strerror or error})",
                f"Make room or give permission; then {onward}",
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Self:
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
                f"{path} is missing or is no checkpoint of `{cls.command}`",
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


def segment_seed(seed: int, stage: str, number: int) -> int:
    """Seed of all generators in one segment of a stage, below 2³²."""
    words = [seed, *stage.encode(), number]
    return int(np.random.SeedSequence(words).generate_state(1)[0])
