"""Energy of single requests: the shares that they had in the steps of an engine that were read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from offramp.controller.costs.readings import EnergyMethod, EnergyReading, EnergyShare
from offramp.worker.decoding.request import CompletionStats, TokenEvent
from offramp.worker.decoding.sequence import Sequence as Row
from offramp.worker.energy.step_meter import attributed


class Charge(NamedTuple):
    """What a row did in a step, and its share of what the step took.

    Attributes:
        row: The row.
        calls: Layers executed for it, those of the quantised copy included.
        joules: Its share of the step's energy, which is shared by these layers.
    """

    row: Row
    calls: int
    joules: float


def charges(joules: float, calls: Sequence[tuple[Row, int]]) -> list[Charge]:
    """Share a step's energy among the rows by the layers that it executed for each.

    Args:
        joules: Energy of the step.
        calls: All rows, and the layers that were executed for each; some wait, and have none.
    """
    total = sum(each for _, each in calls) or 1
    return [Charge(row, each, joules * each / total) for row, each in calls]


@dataclass(slots=True)
class _Taken:
    """What a request took so far in steps that were read.

    Attributes:
        read: Method and source of the readings.
    """

    read: tuple[EnergyMethod, str]
    joules: float = 0.0
    calls: int = 0

    def share(self, stats: CompletionStats) -> EnergyShare | None:
        """The energy of all its layers; None if its counter has not moved meanwhile."""
        calls = stats.layer_calls + stats.copy_calls
        if not self.joules:
            return None
        return EnergyShare(self.joules * calls / self.calls, *self.read, self.calls / calls)


class RequestMeter:
    """Adds up the charges of the requests that run, and tells each at its end."""

    def __init__(self) -> None:
        self._taken: dict[str, _Taken] = {}  # by request

    def charge(self, reading: EnergyReading, charged: Iterable[Charge]) -> None:
        """Add a step that was read to what its rows took; those that are gone are forgotten."""
        read = attributed(reading)
        known, self._taken = self._taken, {}
        for row, calls, joules in charged:
            taken = known.get(row.request.id)
            if taken is None or taken.read != read:  # figures of two methods are not added up
                taken = _Taken(read)
            taken.joules += joules
            taken.calls += calls
            self._taken[row.request.id] = taken

    def told(self, events: list[TokenEvent]) -> list[TokenEvent]:
        """The events of a step; the last one of a request says what it took, if that is known."""
        return [
            event if event.stats is None else self._told(event, event.stats) for event in events
        ]

    def _told(self, event: TokenEvent, stats: CompletionStats) -> TokenEvent:
        taken = self._taken.pop(event.request_id, None)
        if taken is None:
            return event
        return event._replace(stats=replace(stats, energy=taken.share(stats)))
