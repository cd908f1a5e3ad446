"""Energy per decoded token, with the way it was obtained.

Metered in the runs that are timed. A modelled source counts the engine's launches there, which
costs about as much per layer under any policy: docs/evaluation.md says how much.

Shape suffixes: C policies, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.agents.evaluation.measure import Pair, paired_costs
from offramp.agents.evaluation.statistics import Estimate, Floats, bootstrap_ratio
from offramp.controller.costs.readings import EnergyMethod, EnergyReading


@dataclass(frozen=True, slots=True)
class Metered:
    """Joules of one policy, and of full depth beside it.

    Attributes:
        method: How the joules were obtained.
        source: Which counter, or which model and coefficients, gave them.
        joules: The policy's and full depth's, per document; [D] each. None where unknown.
    """

    method: EnergyMethod
    source: str
    joules: tuple[Floats, Floats] | None


@dataclass(frozen=True, slots=True)
class Energy:
    """What decoding took.

    Attributes:
        method: How the figures were obtained.
        source: Which counter, or which model and coefficients, gave them.
        ratios: Joules per token over full depth's, one per policy; None where unknown.
        full_j: Joules per token at full depth; None where unknown.
    """

    method: EnergyMethod
    source: str
    ratios: list[Estimate | None]
    full_j: float | None

    @property
    def label(self) -> str:
        """Method and source, in words."""
        return f"{self.method.value.replace('_', ' ')}: {self.source}"


def metered(pairs_CD: Sequence[Sequence[Pair]]) -> list[Metered]:
    """Full depth's joules, then each policy's: what the meter told of one policy's runs or more."""
    readings = [run for pairs in pairs_CD for pair in pairs for run in (pair.mine, *pair.around)]
    method, source = _weakest(readings), readings[0].source
    joules_CD = [[pair.joules for pair in pairs if pair.joules] for pairs in pairs_CD]
    # One unknown run would shift a ratio without a word, so it leaves all of them unknown.
    if any(len(mine) < len(pairs) for mine, pairs in zip(joules_CD, pairs_CD, strict=True)):
        return [Metered(method, source, None)] * (1 + len(pairs_CD))
    if not np.asarray(joules_CD).sum(1).all():
        stuck = Metered(EnergyMethod.UNAVAILABLE, f"{source} is too coarse for these runs", None)
        return [stuck] * (1 + len(pairs_CD))
    return [Metered(method, source, each) for each in paired_costs(joules_CD)]


def energy_of(policies: Sequence[Metered], timed_tokens: int, seed: int = 0) -> Energy:
    """Ratios of one policy or more to full depth, metered on so many tokens of each document."""
    known = [each.joules for each in policies if each.joules is not None]
    ratios = [each.joules and bootstrap_ratio(*each.joules, seed) for each in policies]
    full_j = float(np.mean([full_D for _, full_D in known])) / timed_tokens if known else None
    return Energy(policies[0].method, policies[0].source, ratios, full_j)


def _weakest(readings: Sequence[EnergyReading]) -> EnergyMethod:
    """One label for all: a GPU that others used for some of the runs counts as shared."""
    methods = {each.method for each in readings}
    if len(methods) > 1:
        assert methods == {EnergyMethod.MEASURED_DEVICE, EnergyMethod.MEASURED_SHARED}
        return EnergyMethod.MEASURED_SHARED
    return methods.pop()
