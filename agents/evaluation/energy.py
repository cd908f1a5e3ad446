"""Energy per decoded token, with the way it was come by.

Metered apart from time: a modelled source counts the engine's calls and slows it a little.

Shape suffixes: C policies, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.agents.evaluation.measure import HeldOut, Protocol
from offramp.agents.evaluation.statistics import Estimate, bootstrap_ratio
from offramp.controller.energy import EnergyMethod, EnergyReading
from offramp.controller.policy import NeverExit, Policy
from offramp.worker.energy import Meter, open_meter
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.sequence import Sequence as Row


@dataclass(frozen=True, slots=True)
class Energy:
    """What decoding took.

    Attributes:
        method: How the figures were come by.
        source: Which counter, or which model and coefficients.
        ratios: Joules per token over full depth's, one per policy; None where unknown.
        full_j: Joules per token at full depth; None where unknown.
    """

    method: EnergyMethod
    source: str
    ratios: list[Estimate | None]
    full_j: float | None


def measure_energy(
    engine: AdaptiveEngine,
    policies: Sequence[Policy],
    documents: Sequence[HeldOut],
    protocol: Protocol,
) -> Energy:
    """Joules of decoding the timed tokens of each document at batch 1, interleaved.

    Args:
        engine: Idle.
        policies: Without full depth, which is metered beside them on every document.
        documents: What to decode.
        protocol: How much of it.
    """
    meter = open_meter(engine)
    everyone = [NeverExit(), *policies]
    readings: list[list[EnergyReading]] = [[] for _ in everyone]
    for d, document in enumerate(documents):
        for turn in range(len(everyone)):
            c = (turn + d) % len(everyone)
            readings[c].append(_decode(engine, meter, everyone[c], document, protocol))
    first = readings[0][0]
    joules = [[each.joules for each in mine] for mine in readings]
    if any(value is None for mine in joules for value in mine):
        return Energy(first.method, first.source, [None] * len(policies), None)
    joules_CD = np.asarray(joules, np.float64)
    ratios: list[Estimate | None] = [bootstrap_ratio(mine, joules_CD[0]) for mine in joules_CD[1:]]
    return Energy(
        first.method, first.source, ratios, float(joules_CD[0].mean()) / protocol.timed_tokens
    )


def _decode(
    engine: AdaptiveEngine, meter: Meter, policy: Policy, document: HeldOut, protocol: Protocol
) -> EnergyReading:
    """One document, teacher-forced; its prompt is read before the meter starts."""
    start = protocol.prompt_tokens
    forced = document.tokens[start : start + 1 + protocol.timed_tokens]
    engine.submit(list(document.tokens[:start]), policy=policy, forced=forced)
    finished: dict[str, Row] = {}
    while engine.is_prefilling:
        engine.step(finished)
    with meter.measure() as span:
        while engine.load != (0, 0):
            engine.step(finished)
    return span.reading
