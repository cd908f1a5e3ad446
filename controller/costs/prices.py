"""What the parts of one launch cost: a timing with its interval, and prices at some size.

Seconds and joules are those of the whole launch: divide by its rows for a row's share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import ConfigError

PARTS = ("layer", "head", "probe", "policy", "fill", "step", "build")
"""What is timed at every number of rows."""

SPAN_PARTS = ("layer", "head")
"""What is timed over several tokens of one row, as a verifying pass takes them."""


LEAST_REPEATS = 6
"""Fewer cannot give a 95 % interval of a median: the range of five holds it 94 % of the time."""

PROBE_PARTS = ("probe", "policy", "build")
"""What is timed of every feature schema."""


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
        step_s: What a launch pays besides (embedding, rotary, bookkeeping).
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
