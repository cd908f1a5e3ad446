"""What the parts of one launch cost: a timing with its interval, and prices at some size.

Seconds and joules are those of the whole launch: divide by its rows for a row's share.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import ConfigError

PARTS = ("layer", "head", "probe", "policy", "fill", "step", "build")
"""What is timed at every number of rows."""

COPY_PARTS = ("layer", "head")
"""What is timed on a copy of the layers in fewer bytes."""

SPAN_PARTS = (*COPY_PARTS, "step")
"""What is timed over several tokens of a row, in the launch that verifies its drafts."""

LEAST_REPEATS = 6
"""Fewer cannot give a 95 % interval of a median: the range of five holds it 94 % of the time."""

PROBE_PARTS = ("probe", "policy", "build")
"""What is timed of every feature schema."""

ROUTED = "routed"
"""Names, among the probes, that of candidates under a drafter that routes, in its own launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One part at one number of rows, timed again and again.

    Attributes:
        median_s: Median seconds.
        low_s, high_s: 95 % interval of the median; below ``LEAST_REPEATS`` only their range.
        joules: Energy by the table's method; None where unknown.
        repeats: Timings it rests on.
    """

    median_s: float
    low_s: float
    high_s: float
    joules: float | None = None
    repeats: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.low_s <= self.median_s <= self.high_s < math.inf):
            raise ConfigError(
                "timing", f"{self.low_s} ≤ {self.median_s} ≤ {self.high_s} s does not hold"
            )
        if self.joules is not None and not 0 <= self.joules < math.inf:
            raise ConfigError("timing", f"{self.joules} J is no amount of energy")

    @property
    def half_width(self) -> float:
        """Half the interval, relative to the median; 0 for a part that takes no time."""
        return (self.high_s - self.low_s) / 2 / self.median_s if self.median_s else 0.0

    def scaled(self, factor: float) -> Timing:
        """The same at ``factor`` times the price."""
        return replace(
            self,
            median_s=self.median_s * factor,
            low_s=self.low_s * factor,
            high_s=self.high_s * factor,
            joules=None if self.joules is None else self.joules * factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All parts at one size of launch.

    Attributes:
        size: Rows of one token each; in a span, tokens of one row.
        parts: Timing by name of the part.
    """

    size: int
    parts: Mapping[str, Timing]

    @classmethod
    def of_constants(cls, seconds: Mapping[str, float]) -> Batch:
        """One row, each part timed once."""
        timings = {
            part: Timing(median_s=value, low_s=value, high_s=value)
            for part, value in seconds.items()
        }
        return cls(size=1, parts=timings)

    def scaled(self, part: str, factor: float) -> Batch:
        """The same with one part, if it is there, at ``factor`` times its price."""
        if part not in self.parts:
            return self
        return replace(self, parts={**self.parts, part: self.parts[part].scaled(factor)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What each part of one launch costs at one number of rows.

    Attributes:
        rows: Rows in the launch; a number between measured ones is interpolated.
        tokens: Tokens of each row.
        layers: Number of layers L of the model.
        layer_s: Seconds of one decoder layer.
        head_s: Final norm, LM head and argmax over all the launch's tokens.
        probe_s: One probe at an exit; where probe and decision are one compiled call, that call.
        policy_s: The rest of one question to the policy, for all rows: with ``probe_s``, all of it.
        fill_s: Filling the KV of one skipped layer.
        step_s: What a launch pays besides (embedding, rotary, bookkeeping, what it emits).
        build_s: Preparing the probe: paid once per token if its policy reads a probe at all.
        layer_j, head_j, probe_j, policy_j, fill_j, step_j, build_j: Joules; None where unknown.
        energy_method: Says how the joules were obtained.
    """

    rows: float
    tokens: float = 1
    layers: int
    layer_s: float
    head_s: float
    probe_s: float
    policy_s: float
    fill_s: float
    step_s: float
    build_s: float
    layer_j: float | None = None
    head_j: float | None = None
    probe_j: float | None = None
    policy_j: float | None = None
    fill_j: float | None = None
    step_j: float | None = None
    build_j: float | None = None
    energy_method: EnergyMethod = EnergyMethod.UNAVAILABLE

    @property
    def full_s(self) -> float:
        """Seconds of one launch at full depth with no probe."""
        return self.step_s + self.layers * self.layer_s + self.head_s

    @property
    def full_j(self) -> float | None:
        """Joules of one launch at full depth with no probe; None where a part's are unknown."""
        if self.step_j is None or self.layer_j is None or self.head_j is None:
            return None
        return self.step_j + self.layers * self.layer_j + self.head_j


def read_prices(field_name: str, batches: Sequence[Batch], size: float) -> dict[str, float]:
    """Seconds and joules of each part at some size, between measured sizes interpolated linearly.

    Raises:
        ConfigError: outside of what was measured; a guess would be no measurement.
    """
    if not batches:
        return {}
    sizes = [batch.size for batch in batches]
    if not sizes[0] <= size <= sizes[-1]:
        raise ConfigError(
            field_name,
            f"{size} is outside of the {sizes[0]} to {sizes[-1]} that were profiled",
            f"Run `offramp profile` with larger --{field_name}",
        )
    values = {}
    for part in batches[0].parts:
        timings = [batch.parts[part] for batch in batches]
        seconds = [timing.median_s for timing in timings]
        values[f"{part}_s"] = float(np.interp(size, sizes, seconds))
        joules = [timing.joules for timing in timings]
        if None not in joules:
            values[f"{part}_j"] = float(np.interp(size, sizes, np.asarray(joules, np.float64)))
    return values


def batches_from_json(name: str, records: Any) -> tuple[Batch, ...]:
    """Read batches back from JSON values.

    Raises:
        ConfigError: naming what is missing, unknown or unusable.
    """
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise ConfigError(name, "are no list of objects")
    for record in records:
        require_names(name, record, {"size", "parts"})
        if not isinstance(record["parts"], dict):
            raise ConfigError(name, "have parts that are no object")
    return tuple(
        Batch(
            size=typed("size", record["size"], int),
            parts={part: _timing(part, value) for part, value in record["parts"].items()},
        )
        for record in records
    )


def _timing(part: str, record: Any) -> Timing:
    if not isinstance(record, dict):
        raise ConfigError(part, "is no object")
    require_names(part, record, {"median_s", "low_s", "high_s", "joules", "repeats"})
    joules = record["joules"]
    seconds = {name: typed(name, record[name], float) for name in ("median_s", "low_s", "high_s")}
    return Timing(
        **seconds,
        joules=None if joules is None else typed("joules", joules, float),
        repeats=typed("repeats", record["repeats"], int),
    )


def require_names(where: str, record: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse an object whose fields are not exactly those named.

    Raises:
        ConfigError: naming what is missing or unknown.
    """
    missing, unknown = set(names) - set(record), set(record) - set(names)
    if missing or unknown:
        problem = f"lacks {sorted(missing)}" if missing else f"has unknown {sorted(unknown)}"
        raise ConfigError(where, problem)


def typed(name: str, value: Any, kind: type) -> Any:
    """A JSON value of that type; a whole number may stand for a float.

    Raises:
        ConfigError: it is of another type.
    """
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(name, f"{value!r} is no {kind.__name__}")
    return value


def require_batches(name: str, batches: Sequence[Batch], parts: Sequence[str]) -> None:
    """Refuse sizes that do not ascend from 1, and other parts than those named.

    Raises:
        ConfigError: they do not, or there are others.
    """
    sizes = [batch.size for batch in batches]
    if sizes and (sizes[0] != 1 or sizes != sorted(set(sizes))):
        raise ConfigError(name, f"have sizes {sizes}, which do not ascend from 1")
    for batch in batches:
        if set(batch.parts) != set(parts):
            raise ConfigError(name, f"hold {sorted(batch.parts)}, not {sorted(parts)}")
