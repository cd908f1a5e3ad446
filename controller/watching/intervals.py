"""Confidence sequences: intervals that hold at every look at once.

So a canary may be judged after every token. Those of rates are Robbins' mixture of binomial
likelihoods under a uniform prior (Robbins 1970, "Statistical methods related to the law of the
iterated logarithm"; Howard, Ramdas, McAuliffe, Sekhon 2021, "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Annals of Statistics 49(2)). Those of means are asymptotic
(Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2024, "Time-uniform central limit theory and
asymptotic confidence sequences", Annals of Statistics 52(6)): right once there are dozens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

HALVINGS = 60
"""Halvings of the search for an end of an interval: past a double's precision."""

SHARPEST = 100
"""Observations at which an interval of a mean is narrowest for its number."""

FEWEST = 10
"""Observations below which nothing is said of a mean."""


def interval(hits: int, seen: int, confidence: float) -> tuple[float, float]:
    """Bounds of a probability, which hold for all numbers of observations at once.

    Args:
        hits: Observations that were so. More than all of them count as all: a worker's counters
            are copied one by one while it goes on counting.
        seen: All observations.
        confidence: Probability that the bounds hold at every look.
    """
    hits = min(hits, seen)

    def is_refuted(rate: float) -> bool:
        return refutes(hits, seen, rate, confidence)

    best = hits / seen if seen else 0.5
    return _end(0.0, best, is_refuted), _end(1.0, best, is_refuted)


def refutes(hits: int, seen: int, rate: float, confidence: float) -> bool:
    """Whether a rate lies outside the ``interval`` of these observations, without finding it."""
    misses = seen - hits
    mixture = math.lgamma(hits + 1) + math.lgamma(misses + 1) - math.lgamma(seen + 2)
    likelihood = _times_log(hits, rate) + _times_log(misses, 1 - rate)
    return mixture - likelihood >= -math.log(1 - confidence)


def _times_log(count: int, share: float) -> float:
    if count == 0:
        return 0.0
    return count * math.log(share) if share > 0 else -math.inf


def _end(outside: float, inside: float, is_refuted: Callable[[float], bool]) -> float:
    """Where an interval ends, between an end of [0, 1] and the best guess."""
    if not is_refuted(outside):
        return outside
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if is_refuted(middle) else (outside, middle)
    return outside


def mean_interval(
    seen: int, total: float, squares: float, confidence: float
) -> tuple[float, float]:
    """Bounds of a mean of what is never below 0, at every look; (0, ∞) while there are too few.

    Args:
        seen: How many were observed.
        total: Their sum.
        squares: The sum of their squares.
        confidence: Probability that the bounds hold at every look.
    """
    if seen < FEWEST:
        return 0.0, math.inf
    alpha = 1 - confidence
    mean = total / seen
    deviation = math.sqrt(max(0.0, squares / seen - mean**2) * seen / (seen - 1))
    rho2 = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / SHARPEST
    spread = seen * rho2 + 1
    half = deviation * math.sqrt(
        2 * spread / (seen**2 * rho2) * math.log(math.sqrt(spread) / alpha)
    )
    return max(0.0, mean - half), mean + half


def ratio_of(above: tuple[float, float], below: tuple[float, float]) -> tuple[float, float]:
    """Bounds of the ratio of two figures that have bounds of their own."""
    least = 0.0 if math.isinf(below[1]) else above[0] / below[1] if below[1] else math.inf
    return least, above[1] / below[0] if below[0] else math.inf
