from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.agents.calibration.pvalues import (
    BET_SHARE,
    P_VALUES,
    betting,
    binomial,
    binomial_cdf,
    hoeffding_bentkus,
    least_units,
    require_losses,
)
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.release.certificate import Method

shares = st.floats(0.01, 0.99)
some_losses = st.lists(st.floats(0, 1), min_size=1, max_size=40).map(np.asarray)


@given(trials=st.integers(1, 60), chance=shares, data=st.data())
def test_the_binomial_tail_equals_a_sum_of_exact_terms(
    trials: int, chance: float, data: st.DataObject
) -> None:
    successes = data.draw(st.integers(0, trials))
    exact = math.fsum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(successes + 1)
    )
    assert binomial_cdf(successes, trials, chance) == pytest.approx(exact, rel=1e-9)


def test_the_binomial_tail_in_closed_form_and_far_out() -> None:
    assert binomial_cdf(0, 59, 0.05) == pytest.approx(0.95**59)
    assert binomial_cdf(-1, 10, 0.3) == 0.0
    assert binomial_cdf(10, 10, 0.3) == 1.0
    assert binomial_cdf(9, 10, 0.3) == pytest.approx(1 - 0.3**10)
    # So many trials that a plain product of factorials would overflow; against the normal law.
    trials, chance = 200_000, 0.05
    below = round(trials * chance - 2 * math.sqrt(trials * chance * (1 - chance)))
    assert binomial_cdf(below, trials, chance) == pytest.approx(0.02275, rel=0.01)
    assert binomial_cdf(trials // 2, trials, 0.5) == pytest.approx(0.5, abs=2e-3)


def test_the_binomial_p_value_counts_losses() -> None:
    losses = np.asarray([1.0] * 3 + [0.0] * 97)
    assert binomial(losses, 0.1) == pytest.approx(binomial_cdf(3, 100, 0.1))
    with pytest.raises(ConfigError, match=r"method: binomial is for losses of 0 or 1"):
        binomial(np.asarray([0.0, 0.5]), 0.1)


@given(losses=some_losses, delta=shares)
def test_hoeffding_bentkus_equals_its_formula(losses: np.ndarray, delta: float) -> None:
    count, mean = len(losses), min(sum(losses) / len(losses), delta)
    entropy = (mean * math.log(mean / delta) if mean > 0 else 0.0) + (1 - mean) * math.log(
        (1 - mean) / (1 - delta)
    )
    up_to = math.ceil(sum(losses) - 1e-9)
    tail = sum(
        math.comb(count, k) * delta**k * (1 - delta) ** (count - k)
        for k in range(min(up_to, count) + 1)
    )
    expected = min(1.0, math.exp(-count * entropy), math.e * tail)
    assert hoeffding_bentkus(losses, delta) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(losses=some_losses, delta=shares)
def test_betting_equals_a_gambler_who_goes_one_by_one(losses: np.ndarray, delta: float) -> None:
    total, squares, wealth, best = delta / 2, delta**2 / 4, 1.0, 0.0
    for count, loss in enumerate(losses, start=1):
        mean, variance = total / count, squares / count  # of those before
        edge = delta - mean
        stake = min(max(edge / (variance + edge**2), 0), BET_SHARE / (1 - delta))
        wealth *= 1 - stake * (loss - delta)
        best = max(best, wealth)
        total += loss
        squares += (loss - total / (count + 1)) ** 2
    assert betting(losses, delta) == pytest.approx(min(1.0, 1 / best), rel=1e-6)


@given(losses=some_losses, delta=shares, method=st.sampled_from(["hoeffding-bentkus", "betting"]))
def test_p_values_are_probabilities_and_fall_as_delta_is_relaxed(
    losses: np.ndarray, delta: float, method: Method
) -> None:
    p_value = P_VALUES[method]
    assert 0 <= p_value(losses, delta) <= 1
    if method == "hoeffding-bentkus":
        assert p_value(losses, 0.5 + delta / 2) <= p_value(losses, delta) + 1e-12


@given(losses=st.lists(st.booleans(), min_size=1, max_size=60), delta=shares)
def test_hoeffding_bentkus_never_beats_the_exact_test(losses: list[bool], delta: float) -> None:
    zero_one = np.asarray(losses, np.float64)
    assert hoeffding_bentkus(zero_one, delta) >= binomial(zero_one, delta) - 1e-12


def test_losses_that_vary_little_are_cheaper_to_bet_on() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(0.03, 0.02, size=250).clip(0, 1)
    assert betting(losses, 0.05) < hoeffding_bentkus(losses, 0.05) / 5


@pytest.mark.parametrize(("delta", "epsilon"), [(0.05, 0.05), (0.1, 0.1), (0.02, 0.3)])
def test_fewer_units_than_the_least_never_suffice(delta: float, epsilon: float) -> None:
    least = least_units(delta, epsilon)
    for p_value in P_VALUES.values():
        assert p_value(np.zeros(least - 1), delta) > epsilon
    for p_value in (binomial, hoeffding_bentkus):
        assert p_value(np.zeros(least), delta) <= epsilon


@pytest.mark.parametrize("wrong", [[0.2, 1.01], [-1e-9], [float("nan")], [float("inf")]])
def test_a_loss_outside_its_range_is_refused(wrong: list[float]) -> None:
    with pytest.raises(TraceError, match=r"losses: .* is not in \[0, 1\]"):
        require_losses(np.asarray(wrong))


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(TraceError, match="calibration data: hold no loss"):
        require_losses(np.asarray([]))
