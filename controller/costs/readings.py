"""Readings of energy, each with the way it was come by: a bare number of joules says nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from offramp.controller.errors import ConfigError


class EnergyMethod(StrEnum):
    """How a figure came about. Figures of different methods are never added or compared."""

    MEASURED_DEVICE = "measured_device"
    """A counter of the device that did the work, and that did nothing else meanwhile."""
    MEASURED_SHARED = "measured_shared"
    """A counter of a device on which others may have worked too: all of its joules."""
    ATTRIBUTED = "attributed"
    """A share of a measured figure, by some rule."""
    MODELLED = "modelled"
    """Work or time, multiplied by named coefficients. Nothing was measured but those."""
    WORK_PROXY = "work_proxy"
    """A count of work (layers, bytes), not joules."""
    UNAVAILABLE = "unavailable"
    """Unknown. Never zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyReading:
    """What some stretch of work took.

    Attributes:
        joules: Energy; None where it is unknown.
        method: Says how it was obtained.
        source: The counter or the model, by name.
        scope: What it covers: a device, a package, the process.
        window_s: Seconds it was taken over.
        uncertainty: Relative half-width that is claimed of it; None where nothing is.
    """

    joules: float | None
    method: EnergyMethod
    source: str
    scope: str
    window_s: float
    uncertainty: float | None = None

    def __post_init__(self) -> None:
        unknown = self.method in (EnergyMethod.UNAVAILABLE, EnergyMethod.WORK_PROXY)
        if unknown != (self.joules is None):
            raise ConfigError("joules", f"{self.joules} cannot be {self.method.value}")
        if self.joules is not None and not (math.isfinite(self.joules) and self.joules >= 0):
            raise ConfigError("joules", f"{self.joules} is no amount of energy")

    @property
    def watts(self) -> float | None:
        """Mean power over the window; None where the energy is unknown."""
        if self.joules is None or self.window_s <= 0:
            return None
        return self.joules / self.window_s


class EnergyShare(NamedTuple):
    """What one request took of work that it shared with others: worked out by a rule.

    Attributes:
        joules: Energy that it took.
        method: How it was obtained: ``attributed`` or ``modelled``.
        source: The counter or the model, by name.
        read_share: Share of the request's layers that ran while energy was read, in (0, 1]; the
            others are taken to need as much per layer.
    """

    joules: float
    method: EnergyMethod
    source: str
    read_share: float


def unavailable(window_s: float, why: str) -> EnergyReading:
    """The reading of a machine that offers none."""
    return EnergyReading(
        joules=None, method=EnergyMethod.UNAVAILABLE, source=why, scope="none", window_s=window_s
    )


def total(readings: list[EnergyReading]) -> EnergyReading:
    """Sum of readings of one method, source and scope; unknown if any part is.

    Raises:
        ConfigError: there are none, or their methods, sources or scopes differ: such sums mean
            nothing.
    """
    kinds = {(each.method, each.source, each.scope) for each in readings}
    if len(kinds) != 1:
        names = "; ".join(sorted(" ".join(kind) for kind in kinds)) or "no readings"
        raise ConfigError("readings", f"cannot be added up ({names})", "Add those of one method")
    known = [each.joules for each in readings if each.joules is not None]
    first = readings[0]
    claims = [each.uncertainty for each in readings]
    return EnergyReading(
        joules=math.fsum(known) if len(known) == len(readings) else None,
        method=first.method,
        source=first.source,
        scope=first.scope,
        window_s=math.fsum(each.window_s for each in readings),
        uncertainty=None if None in claims else max(claim or 0.0 for claim in claims),
    )
