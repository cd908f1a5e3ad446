"""p̂ at the best subset of the recorded exits: probes that are not made cost nothing.

Shape suffixes: N tokens, E exits, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from offramp.agents.learning.export import Weights
from offramp.agents.placing.pricing import leaving
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.envs.traces.tokens import TokenTraces

ALL_SUBSETS = 6
"""Up to this many exits every subset is tried; beyond, those of at most LARGEST exits."""

LARGEST = 3

HERE_COLUMNS = ("top1", "margin", "entropy", "top_logit", "depth", "position")
"""Columns of CANDIDATES_V1 that mean the same whichever exits were probed before.

The others compare with the last probe, and traces hold them for the recorded exits only: a p̂ that
reads them would meet other values once it skips one.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """One subset of exits at one threshold, on some traces.

    Attributes:
        exits: Layers asked at.
        logit: Leave where p̂'s logit exceeds this.
        weights: Of the p̂ that decides.
        agreement: Share of tokens equal to the full-depth token.
        cost: Mean cost in units of a full-depth token's time, probes included.
    """

    exits: tuple[int, ...]
    logit: float
    weights: Weights
    agreement: float
    cost: float


def best_subset(
    whole: Weights,
    here: Weights,
    traces: TokenTraces,
    costs: CostTable,
    target: float,
    logits: Iterable[float],
) -> Subset:
    """The cheapest subset and threshold whose agreement reaches the target.

    Full depth without a probe always reaches it, but is no contender: where no subset does, the
    most agreeing one is returned.

    Args:
        whole: Weights of p̂ on all columns: for the whole set of exits.
        here: Weights of a p̂ that reads HERE_COLUMNS only: for every other subset.
        traces: Tokens to choose by: the validation split.
        costs: Measured costs.
        target: Least agreement with full depth, in (0, 1).
        logits: Thresholds to try.

    Raises:
        ConfigError: the traces were not recorded with CANDIDATES_V1.
    """
    if traces.header.schema != CANDIDATES_V1.digest:
        raise ConfigError("traces", "hold other features than CANDIDATES_V1", "Record again")
    exits = len(traces.header.exits)
    thresholds = list(logits)
    whole_NE, here_NE = (_scores(each, traces.features_NEF) for each in (whole, here))
    tried = [
        _measure(tuple(range(exits)), each, whole, whole_NE, traces, costs) for each in thresholds
    ]
    tried += [
        _measure(subset, each, here, here_NE, traces, costs)
        for subset in subsets(exits)
        if len(subset) < exits
        for each in thresholds
    ]
    keeping = [each for each in tried if each.agreement >= target]
    if not keeping:
        return max(tried, key=lambda each: each.agreement)
    return min(keeping, key=lambda each: each.cost)


def subsets(exits: int) -> Iterator[tuple[int, ...]]:
    """Indices of each subset tried, the small ones first."""
    largest = exits if exits <= ALL_SUBSETS else LARGEST
    for size in range(1, largest + 1):
        yield from combinations(range(exits), size)


def _scores(phat: Weights, features_NEF: FloatArray) -> FloatArray:
    x = features_NEF
    for weight, bias in phat[:-1]:
        x = np.tanh(x @ weight + bias)
    weight, bias = phat[-1]
    return np.asarray((x @ weight + bias)[:, :, 0])


def _measure(
    subset: Sequence[int],
    threshold: float,
    weights: Weights,
    score_NE: FloatArray,
    traces: TokenTraces,
    costs: CostTable,
) -> Subset:
    exits = tuple(traces.header.exits[index] for index in subset)
    sure_NE = score_NE[:, subset] > threshold
    taken_N = np.where(sure_NE.any(axis=1), sure_NE.argmax(axis=1), len(subset))
    full_N1 = np.ones((len(traces), 1), np.float32)
    agree_NE = np.concatenate([traces.agree_NE[:, subset], full_N1], axis=1)
    return Subset(
        exits=exits,
        logit=threshold,
        weights=weights,
        agreement=float(agree_NE[np.arange(len(traces)), taken_N].mean()),
        cost=float(leaving(CANDIDATES_V1, exits, costs)[taken_N].mean()),
    )
