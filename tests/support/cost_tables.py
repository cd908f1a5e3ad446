"""An invented cost table with batches, spans, probes and energy, and a counter of energy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from offramp.controller.costs.prices import COPY_PARTS, PARTS, SPAN_PARTS, Batch, Timing
from offramp.controller.costs.readings import EnergyMethod, EnergyReading, unavailable
from offramp.controller.costs.table import CostTable, view_of_one

SECONDS = {"layer": 10.0, "head": 20.0, "probe": 3.0, "policy": 1.0, "fill": 0.5, "step": 2.0}
SECONDS["build"] = 4.0


def timing(seconds: float, joules: float | None = None) -> Timing:
    return Timing(
        median_s=seconds, low_s=0.9 * seconds, high_s=1.2 * seconds, joules=joules, repeats=9
    )


def batch(size: int, growth: float, parts: tuple[str, ...] = PARTS) -> Batch:
    scale = 1 + growth * (size - 1)
    return Batch(
        size=size, parts={part: timing(SECONDS[part] * scale, 5 * scale) for part in parts}
    )


def measured(model: str = "ab" * 32) -> CostTable:
    """Prices grow by a tenth a row, spans by a fifth a token; softmax probes cost a head.

    A layer of the copy in int4 costs 0.4 of the model's own, its head 0.7.
    """
    batches = (batch(1, 0.1), batch(4, 0.1), batch(8, 0.1))
    beside = {"policy": timing(0.5), "build": timing(0.25)}
    softmax = tuple(
        Batch(size=each.size, parts={"probe": each.parts["head"], **beside}) for each in batches
    )
    copy = tuple(batch(size, 0.05, COPY_PARTS) for size in (1, 4, 8))
    return CostTable(
        **view_of_one(batches),
        layers=12,
        machine="invented",
        batches=batches,
        spans=(batch(1, 0.2, SPAN_PARTS), batch(9, 0.2, SPAN_PARTS)),
        passes={
            rows: (batch(1, 0.2, SPAN_PARTS), batch(9, 0.2 + 0.1 * rows, SPAN_PARTS))
            for rows in (4, 8)
        },
        probes={"softmax": softmax},
        copies={"int4": tuple(each.scaled("layer", 0.4).scaled("head", 0.7) for each in copy)},
        schema="candidates",
        model=model,
        dtype="float32",
        threads=2,
        context=128,
        created_at=1.8e9,
        energy_method=EnergyMethod.MODELLED,
        energy_source="invented coefficients",
    )


def leaving(
    costs: CostTable, exits: tuple[int, ...], rows: float = 1, unit: str = "s"
) -> np.ndarray:
    """Cost of leaving at each exit, and of full depth after probing them all, in closed form.

    In units of a launch at full depth of that many rows: leaving at exit i has paid i + 1 probes
    and decisions, step + build + e·layer + (i + 1)·(probe + policy) + (L − e)·fill + head.
    """
    prices = costs.at(rows)
    step, layer, head, probe, policy, fill, build, full = (
        getattr(prices, f"{part}_{unit}")
        for part in ("step", "layer", "head", "probe", "policy", "fill", "build", "full")
    )
    start = step + head + (build if exits else 0.0)
    paid = [
        start + e * layer + (i + 1) * (probe + policy) + (costs.layers - e) * fill
        for i, e in enumerate(exits)
    ]
    end = start + costs.layers * layer + len(exits) * (probe + policy)
    return np.asarray([*paid, end], np.float32) / np.float32(full)


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
