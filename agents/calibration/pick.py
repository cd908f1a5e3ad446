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

Rows = Sequence[Mapping[str, Any]]
"""Rows of an evaluation, as JSON holds them."""


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
        values = (self.quality, self.latency, self.energy)
        if sum(value is not None for value in values) != 1:
            raise ConfigError(
                "quality", "and the budgets exclude each other", "Give exactly one of them"
            )
        option, _, bound = self.asked
        if not 0 < bound <= (1 if option == "quality" else 1e6):
            raise ConfigError(option, f"{bound} is not in (0, 1]", "Write it like 0.9")

    @property
    def asked(self) -> tuple[str, str, float]:
        """The option that was given, the column of rows that it bounds, and the bound."""
        if self.quality is not None:
            return "quality", QUALITY, self.quality
        if self.latency is not None:
            return "latency_budget", LATENCY, self.latency
        assert self.energy is not None
        return "energy_budget", ENERGY, self.energy


def parse_wish(
    quality: float | None, latency_budget: float | None, energy_budget: float | None
) -> Wish | None:
    """Read what the operator asked for off what was typed, if anything.

    Raises:
        ConfigError: two things at once, or a number outside its range.
    """
    if quality is latency_budget is energy_budget is None:
        return None
    return Wish(quality=quality, latency=latency_budget, energy=energy_budget)


@dataclass(frozen=True, slots=True)
class Picked:
    """The measured point that fulfils a wish.

    Attributes:
        policy: Its name in the evaluation.
        setting: Its λ in the family.
        value: What was measured of what was asked.
        split: The documents it was measured on, "validation" or "test".
        how: How an energy was obtained, to be said after it; else "".
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
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            "policies", f"{path} is no readable evaluation", "Run `offramp evaluate` first"
        ) from error


def pick(rows: Mapping[str, Rows], family: str, wish: Wish) -> Picked:
    """The cheapest point that keeps a quality, or the best one within a budget.

    Reads validation rows where they were measured for what is asked, else test rows: choosing by
    those spends the test set for what it says of the chosen point, but not the certificate, which
    rests on other documents.

    Args:
        rows: Rows by split, as ``load_rows`` gives them.
        family: Name of the family whose points are meant.
        wish: What is asked of the point.

    Raises:
        ConfigError: no point of the family was measured, or none fulfils the wish.
    """
    option, column, bound = wish.asked
    mine = {split: [row for row in each if row["family"] == family] for split, each in rows.items()}
    # Validation first: a choice by test rows makes what they say of the chosen point too good.
    for split in ("validation", "test"):
        asked = ("setting", column, QUALITY)
        measured = [row for row in mine[split] if all(row.get(key) is not None for key in asked)]
        if measured:
            best = _best(measured, option, column, bound)
            value, how = float(best[column]), _how(best, column)
            return Picked(str(best["policy"]), float(best["setting"]), value, split, how)
    raise ConfigError(
        "policies",
        f"the evaluation has no {column} of {family!r}",
        _remedy([row for each in mine.values() for row in each], column),
    )


def _remedy(mine: Rows, column: str) -> str:
    """What to do where no row of a family holds what was asked for."""
    if column != ENERGY or not mine:
        return "Evaluate that family, or ask for something else"
    if any(row.get("energy_method") == EnergyMethod.UNAVAILABLE.value for row in mine):
        return "Evaluate where joules can be had (docs/costs.md), or ask for something else"
    return "It is of an older version: run `offramp evaluate` again, or ask for something else"


def _how(row: Mapping[str, Any], column: str) -> str:
    """An energy's method, in words and brackets: no such figure is given without it."""
    method = row.get("energy_method") if column == ENERGY else None
    return f" (energy, {method})".replace("_", " ") if method else ""


def _best(rows: Rows, option: str, column: str, bound: float) -> Mapping[str, Any]:
    if column == QUALITY:
        keeping = [row for row in rows if row[QUALITY] >= bound]
        if keeping:
            return min(keeping, key=lambda row: row["mean_layers"])
        nearest = max(row[QUALITY] for row in rows)
        problem = f"no measured point keeps {bound:g}; the best {nearest:.4g}"
        raise ConfigError(option, problem, "Ask for less, or train points for higher --targets")
    within = [row for row in rows if row[column] <= bound]
    if within:
        return max(within, key=lambda row: row[QUALITY])
    least = min(rows, key=lambda row: row[column])
    told = f"{least[column]:.4g}{_how(least, column)}"
    problem = f"no measured point is within {bound:g}; the least is {told}"
    raise ConfigError(option, problem, "Allow more, or train points for lower --targets")
