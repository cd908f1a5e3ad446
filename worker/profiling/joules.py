"""Joules of a step's parts: a share of what was measured over all of them, or modelled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from offramp.controller.costs.prices import Timing
from offramp.controller.costs.readings import EnergyMethod
from offramp.worker.energy import EnergyModel, open_meter
from offramp.worker.energy.modelled import ModelledSource, weight_bytes
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.loop import PROCESSOR, PartClock

WHOLE_HEAD = "softmax"
"""Name of the schemas whose probe reads the whole head."""


@dataclass(slots=True)
class PartEnergy:
    """Turns a part's seconds into joules once the profile has ended.

    A counter is too slow for one part, so its mean power over the whole profile is charged for
    each part's time: *attributed*. The model is charged per part: the cores that were busy during
    the profile for its time, and the weights that it reads once.

    Attributes:
        method, source: Say how every figure was obtained.
        watts: Mean power; None where unknown.
        bytes_by_part: Weights read, for the model; parts that are not named read none.
        per_byte: Joules of one.
    """

    method: EnergyMethod = EnergyMethod.UNAVAILABLE
    source: str = ""
    watts: float | None = None
    bytes_by_part: dict[str, int] = field(default_factory=dict)
    per_byte: float = 0.0

    def priced(self, table: str, part: str, timing: Timing) -> Timing:
        """A part's timing with its joules."""
        if self.watts is None:
            return timing
        reads_head = part == "probe" and table == WHOLE_HEAD
        read = self.bytes_by_part.get("head" if reads_head else part, 0)
        joules = self.watts * timing.median_s + self.per_byte * read
        return replace(timing, joules=joules)


@contextmanager
def metered(engine: AdaptiveEngine, clock: PartClock) -> Iterator[PartEnergy]:
    """Read the engine's meter around a profile; what is yielded is complete afterwards."""
    energy = PartEnergy()
    meter = open_meter(engine)
    if isinstance(meter.source, ModelledSource):  # it would count calls while they are timed
        busy, start = time.process_time(), time.perf_counter()
        yield energy
        cores = (time.process_time() - busy) / (time.perf_counter() - start)
        # Processor time is the time of one busy core, however long it waited for it.
        _model(energy, engine, meter.source.model, 1.0 if clock.kind == PROCESSOR else cores)
        return
    with meter.measure() as span:
        yield energy
    energy.source = span.reading.source
    if span.reading.watts is not None:
        energy.method = EnergyMethod.ATTRIBUTED
        energy.source = f"{span.reading.source}, by time"
        energy.watts = span.reading.watts


def _model(energy: PartEnergy, engine: AdaptiveEngine, model: EnergyModel, cores: float) -> None:
    projector = engine.decoder.projector
    energy.method = EnergyMethod.MODELLED
    energy.source = model.source
    energy.watts = model.joules(cores, 0)
    energy.per_byte = model.joules(0, 1)
    energy.bytes_by_part = {
        "layer": weight_bytes(engine.stack.blocks[0]),
        "head": weight_bytes(engine.stack.head),
        "fill": projector.rows * projector.weight_RD[0].nbytes if projector else 0,
    }
