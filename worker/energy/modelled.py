"""Energy by a model, for machines without counters: busy cores and bytes from memory.

    joules = watts_per_busy_core · core seconds + joules_per_dram_byte · bytes

The coefficients are other machines' published figures, not this one's: a modelled figure tells
policies apart, by the work they save, and is no measurement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from offramp.controller.costs.readings import EnergyMethod, EnergyReading
from offramp.worker.engine.core import EngineCore


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficient:
    """One number of the model.

    Attributes:
        value: What is used.
        low, high: The range that its sources span.
        unit: Unit of all three values.
        source: Where it comes from, and what it assumes.
    """

    value: float
    low: float
    high: float
    unit: str
    source: str


COEFFICIENTS: Mapping[str, Coefficient] = {
    "watts_per_busy_core": Coefficient(
        value=3.0,
        low=1.9,
        high=4.05,
        unit="W",
        source=(
            "SPECpower_ssj2008 at full load per hardware thread, as Cloud Carbon Footprint"
            " averages it by microarchitecture: EPYC Milan 1.87, Skylake 4.05; the middle is taken."
            " Whole servers, so a share of their idle power, fans and memory is in it"
        ),
    ),
    "joules_per_dram_byte": Coefficient(
        value=0.24e-9,
        low=0.16e-9,
        high=0.33e-9,
        unit="J/B",
        source=(
            "Horowitz, Computing's energy problem, ISSCC 2014: a DRAM access of 64 bits takes"
            " 1.3 to 2.6 nJ. Every weight that is used counts as read from memory once per launch,"
            " though caches may hold some; activations and cache entries count as cached"
        ),
    ),
}
"""The model's coefficients by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """The formula above, with its coefficients.

    Attributes:
        coefficients: By name; both of ``COEFFICIENTS`` are needed.
    """

    coefficients: Mapping[str, Coefficient] = field(default_factory=lambda: COEFFICIENTS)

    @property
    def source(self) -> str:
        """The coefficients, in words."""
        return " + ".join(f"{each.value:g} {each.unit}" for each in self.coefficients.values())

    def joules(self, core_s: float, dram_bytes: float) -> float:
        """Energy of some work."""
        return self._joules("value", core_s, dram_bytes)

    def uncertainty(self, core_s: float, dram_bytes: float) -> float | None:
        """Half of what its coefficients' ranges allow, relative to it; None for no work."""
        middle = self.joules(core_s, dram_bytes)
        width = self._joules("high", core_s, dram_bytes) - self._joules("low", core_s, dram_bytes)
        return width / 2 / middle if middle else None

    def _joules(self, end: str, core_s: float, dram_bytes: float) -> float:
        watts = getattr(self.coefficients["watts_per_busy_core"], end)
        per_byte = getattr(self.coefficients["joules_per_dram_byte"], end)
        return float(watts * core_s + per_byte * dram_bytes)


class ModelledSource:
    """The model, fed with this process's processor time and the weights that an engine uses.

    Args:
        engine: On a CPU; its layers, head and fills are counted while a window is open.
        model: Formula that turns work into joules.
    """

    def __init__(self, engine: EngineCore, model: EnergyModel | None = None) -> None:
        self.engine = engine
        self.model = model or EnergyModel()

    def start(self) -> tuple[float, MemoryTraffic]:
        """Begin to count busy cores and bytes."""
        return time.process_time(), MemoryTraffic(self.engine)

    def stop(self, before: tuple[float, MemoryTraffic], window_s: float) -> EnergyReading:
        """Processor time and bytes since, in joules."""
        core_s = time.process_time() - before[0]
        dram_bytes = before[1].close()
        return EnergyReading(
            joules=self.model.joules(core_s, dram_bytes),
            method=EnergyMethod.MODELLED,
            source=self.model.source,
            scope="this process's cores and the weights it read",
            window_s=window_s,
            uncertainty=self.model.uncertainty(core_s, dram_bytes),
        )


class MemoryTraffic:
    """Counts the bytes of weights that an engine uses, launch by launch, until it is closed."""

    def __init__(self, engine: EngineCore) -> None:
        self.bytes = 0
        stack = engine.stack
        modules = [*stack.blocks, stack.head]
        self._hooks = [module.register_forward_hook(self._counter(module)) for module in modules]
        self._projector: Any = engine.decoder.projector
        if self._projector is not None:
            self._watch_fills(self._projector)

    def close(self) -> int:
        """Stop counting; the bytes so far."""
        for hook in self._hooks:
            hook.remove()
        if self._projector is not None:
            del self._projector.fill
        return self.bytes

    def _counter(self, module: nn.Module) -> Any:
        size = weight_bytes(module)

        def count(*_: Any) -> None:
            self.bytes += size

        return count

    def _watch_fills(self, projector: Any) -> None:
        fill = projector.fill
        layer_bytes = projector.rows * projector.weight_RD[0].nbytes
        layers = len(projector.weight_RD) // projector.rows

        def counting(x_ND: Any, first_layer: int, *rest: Any) -> Any:
            self.bytes += (layers - first_layer) * layer_bytes
            return fill(x_ND, first_layer, *rest)

        projector.fill = counting


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
