"""Statistics against closed forms, brute force and known coverage."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.agents.evaluation.statistics import (
    RESAMPLES,
    Resample,
    bootstrap_ratio,
    hypervolume,
    ratio,
)

REFERENCE = (1.0, 0.9)


def test_the_bootstrap_covers_a_known_ratio() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        below = rng.uniform(50, 150, size=30)
        above = below * rng.normal(0.8, 0.1, size=30)
        found = bootstrap_ratio(above, below, trial)
        covered += found.low <= 0.8 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_bootstrap_of_a_constant_ratio_is_that_ratio() -> None:
    below = np.asarray([1.0, 5.0, 9.0])
    found = bootstrap_ratio(0.5 * below, below)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_resampled_sums_equal_a_loop() -> None:
    values = np.random.default_rng(0).normal(size=(3, 7))
    draws = Resample.draw(3, 7, seed=1)
    sums = draws.sums(values)
    assert sums.shape == (RESAMPLES, 3)
    for b in (0, 1, RESAMPLES - 1):
        for s in range(3):
            row = values[draws.seeds_BS[b, s]]
            assert sums[b, s] == pytest.approx(sum(row[d] for d in draws.documents_BD[b]))


def test_seeds_that_differ_widen_the_interval() -> None:
    below = np.random.default_rng(0).uniform(1, 2, size=(5, 40))
    alike = ratio(0.8 * below, below, Resample.draw(5, 40))
    factors = np.asarray([[0.7], [0.75], [0.8], [0.85], [0.9]])
    apart = ratio(factors * below, below, Resample.draw(5, 40))
    assert alike.value == pytest.approx(apart.value) == pytest.approx(0.8)
    assert alike.high - alike.low < 1e-9
    # Σ of 5 draws from {.7 … .9}: the deviation of their mean is √(.005 / 5).
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * np.sqrt(0.001), rel=0.15)


def test_documents_are_drawn_alike_whatever_the_number_of_seeds() -> None:
    one, five = Resample.draw(1, 9, seed=4), Resample.draw(5, 9, seed=4)
    assert np.array_equal(one.documents_BD, five.documents_BD)


def test_hypervolumes_of_single_points_are_rectangles() -> None:
    def volume(cost: float, quality: float) -> float:
        return hypervolume(np.asarray([cost]), np.asarray([quality]), REFERENCE)

    assert volume(0.5, 0.95) == pytest.approx(0.5 * 0.05 / 0.1)
    assert volume(0.0, 1.0) == pytest.approx(1)
    assert volume(1.0, 1.0) == 0
    assert volume(0.5, 0.9) == 0
    assert volume(1.2, 1.0) == 0
    # Chance may lift a policy above full depth: no more than the whole corner counts.
    assert volume(0.5, 1.3) == pytest.approx(0.5)


def test_the_hypervolume_equals_counting_a_grid() -> None:
    rng = np.random.default_rng(0)
    steps = 400
    costs = (np.arange(steps) + 0.5) / steps
    qualities = 0.9 + 0.1 * (np.arange(steps) + 0.5) / steps
    for _ in range(5):
        cost, quality = rng.uniform(0.2, 1.1, size=6), rng.uniform(0.85, 1.02, size=6)
        dominated = np.zeros((steps, steps), bool)
        for c, q in zip(cost, quality, strict=True):
            dominated |= (costs[:, None] >= c) & (qualities[None] <= q)
        found = hypervolume(cost, quality, REFERENCE)
        assert found == pytest.approx(dominated.mean(), abs=0.01)
