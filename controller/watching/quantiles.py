"""Counts times in buckets that workers and their publisher share, and bounds their quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from offramp.controller.watching.intervals import interval

BUCKETS = 80
"""Buckets of a count of times."""

SHORTEST_S = 1e-4
"""Upper edge of the first bucket, seconds."""

PER_DOUBLING = 4
"""Buckets in which times double: each is 19 % longer than the one before, the last 88 s."""


def bucket_of(seconds: float) -> int:
    """The bucket of a time; what is longer than the last edge falls into the last."""
    if seconds <= SHORTEST_S:
        return 0
    return min(BUCKETS - 1, math.ceil(PER_DOUBLING * math.log2(seconds / SHORTEST_S)))


def edge_s(bucket: int) -> float:
    """Upper edge of a bucket, seconds; 0 of the one before the first, infinite after the last."""
    if bucket < 0:
        return 0.0
    return math.inf if bucket >= BUCKETS else SHORTEST_S * 2.0 ** (bucket / PER_DOUBLING)


def quantile_s(counts: Sequence[int], share: float) -> float:
    """Upper edge of the bucket in which the quantile lies, seconds; 0 if nothing was counted."""
    seen = sum(counts)
    below = accumulate(counts)
    return edge_s(next(n for n, most in enumerate(below) if most >= share * seen)) if seen else 0.0


def quantile_interval(
    counts: Sequence[int], share: float, confidence: float
) -> tuple[float, float]:
    """Bounds of a quantile in seconds, which hold for all numbers of observations at once.

    The share of times below a bucket's edge is bounded as any probability is; the quantile lies
    where these bounds meet it.

    Args:
        counts: Times by bucket.
        share: Which quantile, in (0, 1).
        confidence: Probability that both bounds hold at every look.
    """
    seen = sum(counts)
    least: int | None = None
    for bucket, below in enumerate(accumulate(counts)):
        low, high = interval(below, seen, confidence)
        if least is None and high >= share:
            least = bucket
        if low >= share:
            return edge_s((least or 0) - 1), edge_s(bucket)
    return edge_s((least or 0) - 1), math.inf
