"""Energy of requests and of a channel's tracks: what each engine step took, shared among its rows.

A step that serves one row, or one track, alone is that one's; one that serves several is shared by
the layers that each executed. So the less they meet in a step, the less of a figure is a rule and
the more of it a measurement. Steps that read prompts are left out: their energy is no token's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from offramp.controller.costs.readings import EnergyReading
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.controller.watching.tally import Tally
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.energy.meter import EnergySource
from offramp.worker.energy.request_meter import Charge, RequestMeter, charges
from offramp.worker.energy.step_meter import MOST_FIRST, MOST_READING, StepMeter, TrackBatches
from offramp.worker.engine.core import EngineCore
from offramp.worker.engine.service import Step


class TrackMeter:
    """Runs the steps of an engine with a meter around them; used by the thread that decodes.

    Args:
        engine: Its steps are charged.
        source: Is read before and after each.
        watches: The watches of the releases that run now.
        most, most_first: Shares of the time that may go to readings, and to charging them; the
            second while a request runs of which nothing was read.
    """

    def __init__(
        self,
        engine: EngineCore,
        source: EnergySource,
        watches: Callable[[], Iterator[PolicyWatch]],
        most: float = MOST_READING,
        most_first: float = MOST_FIRST,
    ) -> None:
        self._engine = engine
        self._watches = watches
        self._most, self._most_first = most, most_first
        self._read: set[str] = set()
        self._steps = StepMeter(source)
        self._requests = RequestMeter()
        self._tracks = TrackBatches()

    @property
    def totals(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Joules and tokens of the steps that were read; see ``StepMeter``."""
        return self._steps.totals

    def __call__(self, step: Step) -> list[TokenEvent]:
        """Run a step, and charge it if it is read; returns its events."""
        running = self._engine.running
        has_read = self._read.issuperset([row.request.id for row in running])
        is_due = self._steps.is_due(self._most if has_read else self._most_first)
        if self._engine.is_prefilling or not is_due:
            return self._requests.told(self._steps.pass_by(step))
        tallies = [(watch.tally, watch.tally.tokens) for watch in self._watches()]
        rows = [(row, row.calls) for row in running]

        def charge(reading: EnergyReading, joules: float) -> None:
            charged = charges(joules, [(row, row.calls - had) for row, had in rows])
            read = {each.row.request.id for each in charged if each.joules}
            self._read = read | self._read.intersection(row.request.id for row in running)
            self._requests.charge(reading, charged)
            self._charge_tracks(reading, charged, tallies)

        events, _ = self._steps.run(step, len, charge)
        return self._requests.told(events)

    def _charge_tracks(
        self, reading: EnergyReading, charged: list[Charge], tallies: list[tuple[Tally, int]]
    ) -> None:
        # Requests of older releases and of none are no track's, and have their share all the same.
        for tally, before in tallies:
            joules = sum(
                each.joules
                for each in charged
                if each.row.watch is not None and each.row.watch.tally is tally
            )
            if joules:
                self._tracks.note(tally, reading, joules, tally.tokens - before)
