"""Who is ahead, and how surely, against counting."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from offramp.agents.evaluation.matched import matched_row
from offramp.agents.evaluation.scores import AGREEMENT
from offramp.research.comparisons import (
    BENCHMARK_KEYS,
    benchmark_row,
    improvement,
    probability_of_improvement,
    saves_more,
)
from support.measured import FULL, measured


def test_the_probability_of_improvement_equals_counting_pairs() -> None:
    rng = np.random.default_rng(3)
    mine, theirs = rng.integers(0, 4, size=(4, 6)), rng.integers(0, 4, size=(3, 6))
    wins = 0.0
    for d, (s, r) in product(range(6), product(range(4), range(3))):
        wins += float(mine[s, d] > theirs[r, d]) + 0.5 * float(mine[s, d] == theirs[r, d])
    found = probability_of_improvement(mine.astype(float), theirs.astype(float))
    assert found == pytest.approx(wins / (6 * 4 * 3))


def test_improvement_is_certain_even_or_impossible() -> None:
    low, high = np.zeros((2, 5)), np.ones((3, 5))
    assert improvement(high, low).value == 1
    assert improvement(low, high).value == 0
    assert improvement(low, low).value == 0.5
    found = improvement(np.random.default_rng(0).normal(size=(5, 50)), np.zeros((1, 50)))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.5, abs=0.15)


def test_who_saves_more_on_a_document() -> None:
    fast, slow = measured("p̂", 0.01, 0.5), measured("PPO", 0.01, 0.7)
    assert saves_more([fast], [slow]).value == 1
    assert saves_more([slow], [fast]).value == 0
    assert saves_more([fast, slow], [fast]).value == 0.25


def test_the_benchmark_prints_its_keys_of_a_row() -> None:
    row = matched_row("p̂", [measured("p̂", 0.01, 0.8, seed=0)], FULL, AGREEMENT, 0.02)
    assert tuple(benchmark_row(row)) == BENCHMARK_KEYS
