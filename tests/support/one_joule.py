"""A counter of energy that moves by as much as a test wants."""

from __future__ import annotations

import time
from dataclasses import dataclass

from offramp.controller.costs.readings import EnergyMethod, EnergyReading, unavailable


@dataclass
class OneJoule:
    """A counter that moves by a joule between any two looks."""

    known: bool = True
    joules: float = 1.0
    slow_s: float = 0.0
    looks: int = 0

    def start(self) -> None:
        self.looks += 1
        if self.slow_s:
            time.sleep(self.slow_s)

    def stop(self, before: None, window_s: float) -> EnergyReading:
        if not self.known:
            return unavailable(window_s, "nothing here")
        return EnergyReading(
            joules=self.joules,
            method=EnergyMethod.MEASURED_SHARED,
            source="a counter",
            scope="this test",
            window_s=window_s,
        )
