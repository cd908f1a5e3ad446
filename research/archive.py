"""Measurements on disk, so that a long evaluation goes on where it was stopped.

One file per policy and split, one per timed document. All were taken under one set of settings,
which lies beside them: others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.agents.evaluation.scores import SUMS, Scores
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError

SETTINGS = "settings.json"

Times = dict[str, tuple[float, float]]
"""Per policy, its seconds on a document and full depth's beside it."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A folder of measurements."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Archive:
        """Make the folder, or go on in one that was measured under the same settings.

        Raises:
            ConfigError: it holds measurements under others, or its settings are unreadable.
        """
        path = folder / SETTINGS
        plain = json.loads(json.dumps(dict(settings), default=str))
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(plain, indent=1).encode())
        there = _read(path)
        if there != plain:
            differing = [key for key in {*there, *plain} if there.get(key) != plain.get(key)]
            raise ConfigError(
                "out",
                f"{folder} was measured under another {', '.join(sorted(differing))}",
                "Name another folder",
            )
        return cls(folder)

    def scores(self, split: str, key: str) -> Scores | None:
        """A policy's scores on a split, if they were taken."""
        path = self._path(split, key)
        return scores_of(_read(path)) if path.exists() else None

    def save_scores(self, split: str, key: str, scores: Scores) -> None:
        """Keep a policy's scores."""
        self._write(self._path(split, key), plain_scores(scores))

    def times(self, split: str, document: int) -> Times:
        """What was timed on a document, by policy."""
        path = self._path(f"{split}-times", f"{document:04d}")
        return {key: tuple(pair) for key, pair in _read(path).items()} if path.exists() else {}

    def save_times(self, split: str, document: int, times: Times) -> None:
        """Keep what was timed on a document."""
        self._write(self._path(f"{split}-times", f"{document:04d}"), times)

    def _path(self, group: str, key: str) -> Path:
        return self.folder / group / f"{key.replace('/', '-')}.json"

    def _write(self, path: Path, plain: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(plain).encode())


def plain_scores(scores: Scores) -> dict[str, Any]:
    """Turn scores into JSON values."""
    sums = {name: getattr(scores, f"{name}_D").tolist() for name in SUMS}
    return {**sums, "depths": {str(layer): n for layer, n in scores.depths.items()}}


def scores_of(plain: Mapping[str, Any]) -> Scores:
    """Read back what ``plain_scores`` gave.

    Raises:
        KeyError, ValueError, TypeError: it is something else.
    """
    sums = {f"{name}_D": np.asarray(plain[name], np.float64) for name in SUMS}
    return Scores(**sums, depths={int(layer): int(n) for layer, n in plain["depths"].items()})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("out", f"{path} is unreadable", "Remove it and measure again") from error
