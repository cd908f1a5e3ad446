"""Energy of requests and of a channel's tracks: what each engine step took, shared among its rows.

A step that serves one row, or one track, alone is that one's; one that serves several is shared by
the layers that each executed. So the less they meet in a step, the less of a figure is a rule and
the more of it a measurement. Steps that read prompts are left out: their energy is no token's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from offramp.controller.costs.readings import EnergyMethod, EnergyReading
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.controller.watching.tally import Tally
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.energy.meter import EnergySource, open_meter
from offramp.worker.energy.modelled import EnergyModel, ModelledSource
from offramp.worker.energy.request_meter import Charge, RequestMeter, attributed, charges
from offramp.worker.engine.core import EngineCore
from offramp.worker.engine.service import Step

BATCH_TOKENS = 64
"""Tokens of a track that make one observation: neighbouring steps serve the same requests, and are
less independent than long batches of them are (batch means)."""


MOST_READING = 0.01
"""Share of the steps' time that may go to readings: sources that take longer are read at fewer."""

READINGS = 5
"""Readings that are made to learn what one costs."""


@dataclass(frozen=True, slots=True)
class BusyCores:
    """This process's processor time, times the model's watts, for machines without counters.

    Unlike ``ModelledSource`` it hooks itself into nothing, so it may run while requests are
    served; bytes from memory are not in it.

    Attributes:
        model: Formula that turns busy cores into joules.
    """

    model: EnergyModel = field(default_factory=EnergyModel)

    def start(self) -> float:
        """Processor time so far, seconds."""
        return time.process_time()

    def stop(self, before: float, window_s: float) -> EnergyReading:
        """Processor time since, in joules."""
        return EnergyReading(
            joules=self.model.joules(time.process_time() - before, 0),
            method=EnergyMethod.MODELLED,
            source=f"{self.model.coefficients['watts_per_busy_core'].value:g} W per busy core",
            scope="this process's cores",
            window_s=window_s,
        )


def serving_source(engine: EngineCore) -> EnergySource:
    """The best source that may be read at every step of an engine that serves."""
    source = open_meter(engine).source
    return BusyCores(source.model) if isinstance(source, ModelledSource) else source


@dataclass(slots=True)
class _TokenBatch:
    """Tokens of a track that no observation was made of yet."""

    joules: float = 0.0
    tokens: int = 0


class TrackMeter:
    """Runs the steps of an engine with a meter around them; used by the thread that decodes.

    Args:
        engine: Its steps are charged.
        source: Is read before and after each.
        watches: The watches of the releases that run now.

    Attributes:
        totals: Joules of all steps that were read, and the tokens they emitted, by the method and
            the source of the reading; figures of different methods are never added up.
    """

    def __init__(
        self, engine: EngineCore, source: EnergySource, watches: Callable[[], Iterator[PolicyWatch]]
    ) -> None:
        self._engine = engine
        self._source = source
        self._watches = watches
        self.totals: dict[tuple[str, str], tuple[float, int]] = {}
        self._requests = RequestMeter()
        self._batches: dict[int, tuple[Tally, _TokenBatch]] = {}  # by generation
        self._stepping_s = self._reading_s = 0.0
        # The least, since a reading that the scheduler interrupts says nothing of the source.
        self._cost_s = min(self._time_reading() for _ in range(READINGS))

    def __call__(self, step: Step) -> list[TokenEvent]:
        """Run a step and charge it; returns its events."""
        start_s = time.perf_counter()
        is_due = self._reading_s <= MOST_READING * self._stepping_s
        events = step() if self._engine.is_prefilling or not is_due else self._metered(step)
        self._stepping_s += time.perf_counter() - start_s
        return self._requests.told(events)

    def _time_reading(self) -> float:
        start_s = time.perf_counter()
        self._source.stop(self._source.start(), 0.0)
        return time.perf_counter() - start_s

    def _metered(self, step: Step) -> list[TokenEvent]:
        tallies = [(watch.tally, watch.tally.tokens) for watch in self._watches()]
        rows = [(row, row.calls) for row in self._engine.running]
        begun, start_s = self._source.start(), time.perf_counter()
        events = step()
        reading = self._source.stop(begun, time.perf_counter() - start_s)
        self._reading_s += self._cost_s
        if reading.joules is not None:
            self._count(reading.joules, reading, len(events))
            charged = charges(reading.joules, [(row, row.calls - had) for row, had in rows])
            self._requests.charge(reading, charged)
            self._charge_tracks(": ".join(attributed(reading)), charged, tallies)
        return events

    def _count(self, joules: float, reading: EnergyReading, tokens: int) -> None:
        read = reading.method.value, reading.source
        before = self.totals.get(read, (0.0, 0))
        self.totals[read] = before[0] + joules, before[1] + tokens

    def _charge_tracks(
        self, meter: str, charged: list[Charge], tallies: list[tuple[Tally, int]]
    ) -> None:
        mine = {tally.generation for tally, _ in tallies}
        # Requests of older releases and of none are no track's, and have their share all the same.
        for tally, before in tallies:
            joules = sum(
                each.joules
                for each in charged
                if each.row.watch is not None and each.row.watch.tally is tally
            )
            if joules:
                batch = self._batch(tally, mine)
                batch.joules += joules
                batch.tokens += tally.tokens - before
                if batch.tokens >= BATCH_TOKENS:
                    tally.note_energy(meter, batch.joules, batch.tokens)
                    del self._batches[tally.generation]

    def _batch(self, tally: Tally, running: set[int]) -> _TokenBatch:
        known = self._batches.get(tally.generation)
        if known is None or known[0] is not tally:  # the release is new, or counted anew
            known = (tally, _TokenBatch())
            kept = {key: each for key, each in self._batches.items() if key in running}
            self._batches = kept | {tally.generation: known}
        return known[1]
