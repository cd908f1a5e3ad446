"""Whether the intervals by which canaries are judged hold at every look at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offramp.controller.watching.intervals import interval, mean_interval, ratio_of, refutes
from offramp.controller.watching.quantiles import (
    BUCKETS,
    bucket_of,
    edge_s,
    quantile_interval,
    quantile_s,
)


@pytest.mark.parametrize(("hits", "seen"), [(0, 5), (3, 10), (10, 10), (40, 100)])
def test_the_ends_are_where_the_mixture_refutes(hits: int, seen: int) -> None:
    """Against a sum over a grid in place of the closed form."""
    grid = (np.arange(200_000) + 0.5) / 200_000
    likelihood = grid**hits * (1 - grid) ** (seen - hits)
    inside = grid[likelihood.mean() < likelihood / 0.05]
    assert interval(hits, seen, 0.95) == pytest.approx((inside[0], inside[-1]), abs=2e-5)


def test_nothing_seen_says_nothing() -> None:
    assert interval(0, 0, 0.95) == (0.0, 1.0)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_the_truth_stays_within_at_every_look(rate: float) -> None:
    rng = np.random.default_rng(0)
    left = 0
    for _ in range(200):
        hits = np.cumsum(rng.random(300) < rate)
        refuted = [refutes(int(hits[n]), n + 1, rate, 0.8) for n in range(300)]
        left += any(refuted)
        for n in range(9, 300, 58):  # the interval is what is not refuted
            low, high = interval(int(hits[n]), n + 1, 0.8)
            assert refuted[n] == (not low <= rate <= high)
    assert 0 < left / 200 <= 0.2


def test_a_mean_stays_within_at_every_look() -> None:
    rng = np.random.default_rng(0)
    left = 0
    for _ in range(100):
        values = rng.exponential(size=400)
        sums, squares = values.cumsum(), (values**2).cumsum()
        looks = (mean_interval(n + 1, sums[n], squares[n], 0.8) for n in range(30, 400))
        left += any(not low <= 1.0 <= high for low, high in looks)
    assert left / 100 <= 0.2
    assert mean_interval(9, 9.0, 9.0, 0.95) == (0.0, math.inf)


def test_a_quantile_stays_within_at_every_look() -> None:
    rng = np.random.default_rng(0)
    truth = -math.log(0.1) * 1e-2  # 90 % of exponential times are shorter
    left = 0
    for _ in range(8):
        counts = [0] * BUCKETS
        for n, seconds in enumerate(rng.exponential(1e-2, size=600)):
            counts[bucket_of(float(seconds))] += 1
            if n % 50 == 49:
                low, high = quantile_interval(counts, 0.9, 0.8)
                left += not low <= truth <= high
        assert quantile_s(counts, 0.9) == pytest.approx(truth, rel=0.4)
    assert left <= 2


def test_times_lie_in_their_buckets() -> None:
    for seconds in (1e-9, 1e-4, 1.01e-4, 0.5, 80.0):
        bucket = bucket_of(seconds)
        assert edge_s(bucket - 1) < seconds <= edge_s(bucket)
    assert bucket_of(1e9) == BUCKETS - 1
    assert quantile_interval([0] * BUCKETS, 0.99, 0.95) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("above", "below", "ratio"),
    [
        ((1.0, 2.0), (4.0, 8.0), (0.125, 0.5)),
        ((1.0, math.inf), (2.0, math.inf), (0.0, math.inf)),
        ((0.0, 0.0), (0.0, 1.0), (0.0, math.inf)),
    ],
)
def test_the_bounds_of_a_ratio(
    above: tuple[float, float], below: tuple[float, float], ratio: tuple[float, float]
) -> None:
    assert ratio_of(above, below) == ratio
