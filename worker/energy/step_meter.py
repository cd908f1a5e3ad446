"""Energy of a worker's steps: a source is read around as many of them as reading costs little."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from offramp.controller.costs.readings import EnergyMethod, EnergyReading
from offramp.controller.watching.tally import Tally
from offramp.worker.energy.meter import EnergySource, NoSource, counter_of
from offramp.worker.energy.modelled import EnergyModel

BATCH_TOKENS = 64
"""Tokens of a track that make one observation: neighbouring steps serve the same requests, and are
less independent than long batches of them are (batch means)."""

MOST_TRACKS = 4
"""Releases whose tokens wait to be an observation, at most: more do not run at once."""

MOST_READING = 0.01
"""Share of the steps' time that may go to readings: sources that take longer are read at fewer."""

MOST_FIRST = 5 * MOST_READING
"""As much may where the step is of a request, or of texts, of which nothing was read before."""

Did = TypeVar("Did")

log = logging.getLogger(__name__)


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


def serving_source(device: torch.device) -> EnergySource:
    """The best source that may be read at every step of what serves on a device."""
    return counter_of(device) or BusyCores()


class StepMeter:
    """Runs steps with a source around them; used by the thread that runs them.

    Args:
        source: Is read before and after a step.

    Attributes:
        totals: Joules of all steps that were read, and what they made (tokens, or classified
            texts), by the method and the source of the reading; figures of different methods are
            never added up.
    """

    def __init__(self, source: EnergySource) -> None:
        self._source = source
        self.totals: dict[tuple[str, str], tuple[float, int]] = {}
        self._stepping_s = self._reading_s = 0.0
        self._stop(self._start(), 0.0)  # the first reading of many a counter takes longest

    def is_due(self, most: float) -> bool:
        """Whether the next step may be read: no more than a share of the time went to readings."""
        return self._reading_s <= most * self._stepping_s

    def pass_by(self, step: Callable[[], Did]) -> Did:
        """Run a step that is not read; returns what it returned."""
        begun_s = time.perf_counter()
        did = step()
        self._stepping_s += time.perf_counter() - begun_s
        return did

    def run(
        self,
        step: Callable[[], Did],
        made: Callable[[Did], int],
        charge: Callable[[EnergyReading, float], object] = lambda _, __: None,
    ) -> tuple[Did, EnergyReading | None]:
        """Run a step, and read what it takes.

        Args:
            step: What is run.
            made: How many tokens, or texts, came of it.
            charge: Told the reading, and its joules, if they are known.

        Returns:
            What the step returned, and what it took, if that is known.
        """
        start_s = time.perf_counter()
        begun, begun_s = self._start(), time.perf_counter()
        did = step()
        took_s = time.perf_counter() - begun_s
        reading = self._stop(begun, took_s)
        if reading.joules is not None:
            self._count(reading, reading.joules, made(did))
            charge(reading, reading.joules)
        # As long as it took, not as a reading in a loop: after a step its code and data are cold.
        self._reading_s += time.perf_counter() - start_s - took_s
        self._stepping_s += took_s
        return did, None if reading.joules is None else reading

    def _start(self) -> Any:
        try:
            return self._source.start()
        except Exception as error:  # of whatever a counter is made of
            self._give_up(error)
            return None

    def _stop(self, begun: Any, window_s: float) -> EnergyReading:
        try:
            return self._source.stop(begun, window_s)
        except Exception as error:
            self._give_up(error)
            return self._source.stop(None, window_s)

    def _give_up(self, error: Exception) -> None:
        """Serve on without a counter that has failed: no request is to fail with it."""
        log.warning("energy is not read any more: %r", error)
        self._source = NoSource(f"it failed: {error}")

    def _count(self, reading: EnergyReading, joules: float, made: int) -> None:
        read = reading.method.value, reading.source
        before, made_before = self.totals.get(read, (0.0, 0))
        self.totals[read] = before + joules, made_before + made


@dataclass(slots=True)
class _TokenBatch:
    """Tokens of a track that no observation was made of yet."""

    tally: Tally
    joules: float = 0.0
    tokens: int = 0


class TrackBatches:
    """Tells tallies what their tokens took, a batch of them at a time."""

    def __init__(self) -> None:
        self._batches: dict[int, _TokenBatch] = {}  # by generation, the latest last

    def note(self, tally: Tally, reading: EnergyReading, joules: float, tokens: int) -> None:
        """Add a release's share of a step that was read.

        Args:
            tally: The release's.
            reading: What the whole step took.
            joules: What the release took of it.
            tokens: Tokens, or texts, that it had of the step.
        """
        batch = self._batches.pop(tally.generation, None)
        if batch is None or batch.tally is not tally:  # the release is new, or counted anew
            batch = _TokenBatch(tally)
        batch.joules += joules
        batch.tokens += tokens
        if batch.tokens >= BATCH_TOKENS and batch.joules:  # 0: the counter has not moved yet
            tally.note_energy(": ".join(attributed(reading)), batch.joules, batch.tokens)
            return
        self._batches[tally.generation] = batch
        for oldest in list(self._batches)[:-MOST_TRACKS]:
            del self._batches[oldest]


def attributed(reading: EnergyReading) -> tuple[EnergyMethod, str]:
    """Method and source of a share: what was measured of all rows at once is attributed to each."""
    is_measured = reading.method in (EnergyMethod.MEASURED_DEVICE, EnergyMethod.MEASURED_SHARED)
    return EnergyMethod.ATTRIBUTED if is_measured else reading.method, reading.source
