"""Repeated timings with the interval of their median, and a policy to time.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from offramp.controller.costs.prices import LEAST_REPEATS, Timing
from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    SOFTMAX_V2,
    FeatureSchema,
    IntArray,
)
from offramp.controller.policies.drafts import DraftRouter
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.net import Weights

CONFIDENCE = 0.95

HIDDEN = (32, 32)
"""Hidden units of the policy that is timed: those the agents train."""

EAGER = 1e6
"""Logit by which one action outweighs whatever random weights say of the others."""


class Key(NamedTuple):
    """What a sample is a timing of.

    Attributes:
        table: "rows", "tokens", "copy", or the name of a feature schema.
        size: Rows in the launch, or tokens of the row.
        part: Name of the part in ``CostTable``.
    """

    table: str
    size: int
    part: str


class Samples:
    """One number per part and round.

    A round is one short run of the engine, whose steps follow one another and so share whatever
    disturbs the machine just then. Their median counts as one sample, so that the interval speaks
    of rounds, which are far apart.
    """

    def __init__(self) -> None:
        self._values: dict[Key, list[float]] = {}

    def add(self, table: str, size: int, parts: Mapping[str, float]) -> None:
        """Note one round's medians, by part."""
        for part, value in parts.items():
            self._values.setdefault(Key(table, size, part), []).append(value)

    def timing(self, key: Key) -> Timing:
        """Median and interval of one part."""
        values = self._values[key]
        middle, low, high = median_interval(values)
        return Timing(median_s=middle, low_s=low, high_s=high, repeats=len(values))

    def bare(self) -> list[Key]:
        """Parts with too few samples for an interval."""
        return [key for key, values in self._values.items() if len(values) < LEAST_REPEATS]

    def loose(self, half_width: float) -> list[Key]:
        """Parts whose interval is wider than that, relative to their median, or none yet."""
        return [
            key
            for key, values in self._values.items()
            if len(values) < LEAST_REPEATS or self.timing(key).half_width > half_width
        ]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median of some values, with a 95 % interval of the median that they were drawn from.

    Between two order statistics, whatever the distribution (Conover 1999, Practical
    Nonparametric Statistics, section 3.2): the j-th smallest and j-th largest of n enclose the
    median with probability 1 − 2·P(B < j), B binomial (n, ½). Fewer than six values cannot reach
    95 %; what is returned then is their range.

    >>> median_interval([3.0, 1.0, 2.0])
    (2.0, 1.0, 3.0)
    """
    ordered = sorted(values)
    count = len(ordered)
    tail, place = 0.0, 0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if tail > (1 - CONFIDENCE) / 2:
            break
        place = below
    return median(ordered), ordered[place], ordered[count - 1 - place]


def random_policy(
    schema: FeatureSchema, exits: tuple[int, ...], candidates_VK: IntArray
) -> MlpPolicy:
    """An untrained policy of the shape that the agents train: it costs what they cost."""
    return MlpPolicy(exits, schema, _random_net(schema.width, 1), candidates_VK=candidates_VK)


def eager_drafter(
    exits: tuple[int, ...], candidates_VK: IntArray | None, max_pending: int
) -> DraftRouter:
    """A drafter of the shape that the agents train, whose drafts all leave at the first exit.

    Without a table it reads the head, as drafters on a copy do.
    """
    schema = SOFTMAX_V2 if candidates_VK is None else CANDIDATES_V1
    seen, actions = OUTLOOK_V1.width + len(("odds", "trust")), len(exits) + 1
    starter, router = (_random_net(width, actions) for width in (seen, schema.width + seen))
    for net in (starter, router):
        net[-1][1][0] = EAGER
    chances = DraftChances([(0.0, 1.0)] * len(exits), exits)
    return DraftRouter(
        exits,
        starter,
        router,
        max_pending=max_pending,
        candidates_VK=candidates_VK,
        chances=chances,
    )


def _random_net(inputs: int, outputs: int) -> Weights:
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((a, b)).astype(np.float32), np.zeros(b, np.float32))
        for a, b in itertools.pairwise((inputs, *HIDDEN, outputs))
    ]
