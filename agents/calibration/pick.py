"""An operator's choice among measured points of one family: by quality, time or energy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import ConfigError

EVALUATION = "evaluation.json"
"""What ``offramp evaluate`` writes beside the policies."""

QUALITY, LATENCY, ENERGY = "agreement", "wall_ratio", "energy_ratio"
"""Columns of an evaluation's rows that can be asked of."""

UNAVAILABLE = EnergyMethod.UNAVAILABLE.value
"""Method of rows whose energy was asked for, and could not be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the operator wants; exactly one of them.

    Attributes:
        quality: Least agreement with full depth, in (0, 1].
        latency: Most time per token, as a share of full depth's.
        energy: Most energy per token, as a share of full depth's.
    """

    quality: float | None = None
    latency: float | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        asked = {
            "quality": self.quality,
            "latency_budget": self.latency,
            "energy_budget": self.energy,
        }
        named = {name: value for name, value in asked.items() if value is not None}
        if len(named) != 1:
            raise ConfigError(
                "quality", "and the budgets exclude each other", "Give exactly one of them"
            )
        for name, value in named.items():
            if not 0 < value <= (1 if name == "quality" else 1e6):
                raise ConfigError(name, f"{value} is not in (0, 1]", "Write it like 0.9")


@dataclass(frozen=True, slots=True)
class Picked:
    """The measured point that fulfils a wish.

    Attributes:
        policy: Its name in the evaluation.
        setting: Its λ.
        value: What was measured of what was asked.
        split: Documents it was measured on.
        how: How an energy was come by, to be said after it; else "".
    """

    policy: str
    setting: float
    value: float
    split: str
    how: str = ""


def load_rows(policies: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of an evaluation by split.

    Raises:
        ConfigError: there is no readable evaluation.
    """
    path = policies / EVALUATION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {split: [dict(row) for row in found[split]] for split in ("validation", "test")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "policies", f"{path} is no readable evaluation", "Run `offramp evaluate` first"
        ) from error


def pick(rows: Mapping[str, Sequence[Mapping[str, Any]]], family: str, wish: Wish) -> Picked:
    """The cheapest point that keeps a quality, or the best one within a budget.

    Reads validation rows where they were measured for what is asked, else test rows: choosing by
    those spends the test set for what it says of the chosen point, but not the certificate, which
    rests on other documents.

    Args:
        rows: By split, as ``load_rows`` gives them.
        family: Whose points.
        wish: What is asked.

    Raises:
        ConfigError: no point of the family was measured, or none fulfils the wish.
    """
    column = _column(wish)
    for split in ("validation", "test"):
        mine = [
            row for row in rows[split] if row["family"] == family and row["setting"] is not None
        ]
        measured = [
            row for row in mine if row.get(column) is not None and row.get(QUALITY) is not None
        ]
        if measured:
            best = _best(measured, wish, column)
            value, how = float(best[column]), _how(best, column)
            return Picked(str(best["policy"]), float(best["setting"]), value, split, how)
    raise ConfigError(
        "policies",
        f"the evaluation has no {column} of {family!r}",
        _remedy([row for each in rows.values() for row in each if row["family"] == family], column),
    )


def _remedy(mine: Sequence[Mapping[str, Any]], column: str) -> str:
    """What to do where no row of a family holds what was asked for."""
    if column != ENERGY or not mine:
        return "Evaluate that family, or ask for something else"
    if any(row.get("energy_method") == UNAVAILABLE for row in mine):
        return "Evaluate where joules can be had (docs/costs.md), or ask for something else"
    return "It is of an older version: run `offramp evaluate` again, or ask for something else"


def _how(row: Mapping[str, Any], column: str) -> str:
    """An energy's method, in words and brackets: no such figure is given without it."""
    method = row.get("energy_method") if column == ENERGY else None
    return f" (energy, {method})".replace("_", " ") if method else ""


def _column(wish: Wish) -> str:
    if wish.quality is not None:
        return QUALITY
    return LATENCY if wish.latency is not None else ENERGY


def _best(rows: Sequence[Mapping[str, Any]], wish: Wish, column: str) -> Mapping[str, Any]:
    if wish.quality is not None:
        least = wish.quality
        keeping = [row for row in rows if row[QUALITY] >= least]
        if keeping:
            return min(keeping, key=lambda row: row["mean_layers"])
        nearest = max(row[QUALITY] for row in rows)
        raise ConfigError(
            "quality",
            f"no measured point keeps {least:g}; the best {nearest:.4g}",
            "Ask for less, or train points for higher --targets",
        )
    most = wish.latency if wish.energy is None else wish.energy
    assert most is not None
    within = [row for row in rows if row[column] <= most]
    if within:
        return max(within, key=lambda row: row[QUALITY])
    nearest = min(rows, key=lambda row: row[column])
    name = "latency_budget" if column == LATENCY else "energy_budget"
    raise ConfigError(
        name,
        f"no measured point is within {most:g}; "
        f"the least is {nearest[column]:.4g}{_how(nearest, column)}",
        "Allow more, or train points for lower --targets",
    )
