"""Readings around some work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from offramp.controller.costs.readings import EnergyReading, unavailable
from offramp.worker.energy.modelled import ModelledSource
from offramp.worker.energy.nvml import open_nvml
from offramp.worker.energy.rapl import open_rapl
from offramp.worker.engine.core import EngineCore


class EnergySource(Protocol):
    """Something that can say what was taken between two moments."""

    def start(self) -> Any:
        """The first moment, for ``stop``."""
        ...

    def stop(self, before: Any, window_s: float) -> EnergyReading:
        """What was taken since."""
        ...


@dataclass(frozen=True, slots=True)
class NoSource:
    """Where there is none.

    Attributes:
        why: Reason, in words.
    """

    why: str

    def start(self) -> None:
        """Do nothing: there is no counter to note."""

    def stop(self, before: None, window_s: float) -> EnergyReading:
        """Report an unknown amount, and why it is unknown."""
        return unavailable(window_s, self.why)


class Span:
    """A stretch of work. ``reading`` is there once it has ended."""

    def __init__(self) -> None:
        self._reading: EnergyReading | None = None

    @property
    def reading(self) -> EnergyReading:
        """Report what the work took."""
        assert self._reading is not None, "the span has not ended"
        return self._reading


@dataclass(frozen=True, slots=True)
class Meter:
    """Reads one source around stretches of work; one at a time.

    >>> meter = Meter(NoSource("none here"))
    >>> with meter.measure() as span:
    ...     pass
    >>> span.reading.joules, span.reading.method.value
    (None, 'unavailable')

    Attributes:
        source: Where the figures come from.
    """

    source: EnergySource

    @contextlib.contextmanager
    def measure(self) -> Iterator[Span]:
        """Read before and after the block; nothing is read if it fails."""
        span = Span()
        before = self.source.start()
        start = time.perf_counter()
        done = False
        try:
            yield span
            done = True
        finally:
            # Stopped in any case: a source may have hooked itself into the engine.
            reading = self.source.stop(before, time.perf_counter() - start)
            span._reading = reading if done else None


def counter_of(device: torch.device) -> EnergySource | None:
    """What counts a device's energy: a GPU's counter, or a processor's packages'.

    None: a processor without one. ``NoSource``: a device of which nothing is known.
    """
    if device.type == "cuda":
        gpu, why = open_nvml(device.index or 0)
        return gpu or NoSource(why)
    if device.type != "cpu":
        return NoSource(f"no counter is known for {device.type}")
    return open_rapl()[0]


def open_meter(engine: EngineCore) -> Meter:
    """The best source for an engine's device that is really there.

    A GPU's counter for a GPU; for a CPU its packages' counters, else the model.
    """
    return Meter(counter_of(engine.stack.device) or ModelledSource(engine))
