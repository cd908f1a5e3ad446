"""Measurements on disk, so that a long evaluation goes on where it was stopped.

One file per policy and split, one per timed document, each whole or absent. All were taken under
one set of settings, which lies beside them: others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.agents.evaluation.measure import Pair
from offramp.agents.evaluation.protocol import AssessConfig, Entrant, Measurer, OnRun
from offramp.agents.evaluation.scores import SUMS, Scores
from offramp.controller.costs.readings import EnergyMethod, EnergyReading
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import Policy
from offramp.worker.energy import Meter
from offramp.worker.engine.engine import AdaptiveEngine

SETTINGS = "settings.json"

Times = dict[str, tuple[float, float]]
"""Per policy, its seconds on a document and full depth's beside it."""


@dataclass(frozen=True, slots=True)
class Archive:
    """A folder of measurements."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], field: str = "out") -> Archive:
        """Make the folder, or go on in one that was measured under the same settings.

        Args:
            folder: Where measurements lie.
            settings: All that they depend on.
            field: The option that chose the folder, for errors.

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
                field,
                f"{folder} was measured under another {', '.join(sorted(differing))}",
                "Give the settings it began with, remove it to measure anew, or name another",
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

    def pairs(self, split: str, document: int) -> dict[str, Pair]:
        """Every policy's run on a document and full depth's beside it, if they were taken."""
        path = self._path(f"{split}-pairs", f"{document:04d}")
        if not path.exists():
            return {}
        return {key: _pair(*map(_reading, three)) for key, three in _read(path).items()}

    def save_pairs(self, split: str, document: int, pairs: Mapping[str, Pair]) -> None:
        """Keep every policy's run on a document and full depth's beside it."""
        plain = {k: [asdict(each) for each in (p.mine, *p.around)] for k, p in pairs.items()}
        self._write(self._path(f"{split}-pairs", f"{document:04d}"), plain)

    def _path(self, group: str, key: str) -> Path:
        return self.folder / group / f"{key.replace('/', '-')}.json"

    def _write(self, path: Path, plain: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(plain).encode())


class KeepingMeasurer(Measurer):
    """Measures nothing that an archive holds, and keeps what it measures as it comes.

    Args:
        config: What is measured on which documents.
        engine: Idle, on the machine whose times count.
        archive: Was opened for these settings; policies go by their names in it.
        on_run: Told how far each phase is.
    """

    def __init__(
        self, config: AssessConfig, engine: AdaptiveEngine, archive: Archive, on_run: OnRun
    ) -> None:
        super().__init__(config, engine, on_run)
        self._archive = archive

    def score(self, split: str, policy: Policy, name: str) -> Scores:
        """What the output of a policy is worth on each document."""
        kept = self._archive.scores(split, name)
        if kept is None:
            kept = super().score(split, policy, name)
            self._archive.save_scores(split, name, kept)
        return kept

    def pairs(
        self, split: str, index: int, entrants: Sequence[Entrant], meter: Meter
    ) -> list[Pair]:
        """What every entrant takes on a document, and full depth beside it."""
        names = [each.contender.name for each in entrants]
        kept = self._archive.pairs(split, index)
        if not kept:
            self.split(split)  # whose decoding has warmed up what is timed
            kept = dict(zip(names, super().pairs(split, index, entrants, meter), strict=True))
            self._archive.save_pairs(split, index, kept)
        return [kept[name] for name in names]


def _reading(plain: Mapping[str, Any]) -> EnergyReading:
    return EnergyReading(**{**plain, "method": EnergyMethod(plain["method"])})


def _pair(mine: EnergyReading, before: EnergyReading, after: EnergyReading) -> Pair:
    return Pair(mine, (before, after))


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
