"""The guarantee itself, over thousands of draws, and that a walk one step too long breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.agents.calibration.fixed_sequence import (
    WalkResult,
    conformal_risk_control,
    learn_then_test,
)
from offramp.agents.calibration.pvalues import binomial_cdf
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.release.certificate import Method, Walked

DRAWS = 2000
DELTA, EPSILON, UNITS = 0.05, 0.1, 400
RISKS = {8.0: 0.004, 4.0: 0.01, 2.0: 0.0501, 1.0: 0.09, 0.5: 0.1}
"""True risk of each setting, by λ, safest first. The third is just too risky: the worst case."""

Draw = Callable[[np.random.Generator], np.ndarray]


def zero_one(rng: np.random.Generator) -> np.ndarray:
    """Losses [settings, N] of the same units under every setting: 0/1, nested."""
    unit_N = rng.random(UNITS)
    return np.stack([unit_N < risk for risk in RISKS.values()]).astype(np.float64)


def means(rng: np.random.Generator) -> np.ndarray:
    """Means of documents: bounded, and far less spread than 0/1."""
    unit_N = rng.beta(2, 2, size=UNITS) * 2
    return np.stack([risk * unit_N for risk in RISKS.values()])


def rare_and_large(rng: np.random.Generator) -> np.ndarray:
    """Most units have no loss, one in ten ten times the mean."""
    unit_N = 10.0 * (rng.random(UNITS) < 0.1)
    return np.stack([risk * unit_N for risk in RISKS.values()])


def walks(draw: Draw, walk: Callable[..., WalkResult], **options: Any) -> list[WalkResult]:
    rng = np.random.default_rng(7)
    outcomes = []
    for _ in range(DRAWS):
        losses = dict(zip(RISKS, draw(rng), strict=True))
        outcomes.append(walk(RISKS, losses.__getitem__, delta=DELTA, **options))
    return outcomes


def most_violations(chance: float) -> int:
    """Violations in DRAWS that a true chance of ``chance`` exceeds once in a thousand times."""
    return next(k for k in range(DRAWS) if binomial_cdf(k, DRAWS, chance) >= 0.999)


def risk_of(step: Walked | None) -> float:
    return 0.0 if step is None else RISKS[step.setting]  # nothing certified: full depth


CASES: list[tuple[Method, Draw]] = [
    ("binomial", zero_one),
    ("hoeffding-bentkus", zero_one),
    ("hoeffding-bentkus", means),
    ("hoeffding-bentkus", rare_and_large),
    ("betting", zero_one),
    ("betting", means),
    ("betting", rare_and_large),
]


@pytest.mark.parametrize(
    ("method", "draw"), CASES, ids=lambda each: getattr(each, "__name__", each)
)
def test_violations_stay_below_epsilon_and_one_step_more_breaks_it(
    method: Method, draw: Draw
) -> None:
    outcomes = walks(draw, learn_then_test, epsilon=EPSILON, method=method)
    allowed = most_violations(EPSILON)
    violations = sum(risk_of(outcome.certified) > DELTA for outcome in outcomes)
    assert violations <= allowed
    # Not because nothing is ever certified: the second setting nearly always is.
    safe = sum(outcome.certified is not None for outcome in outcomes)
    assert safe > 0.9 * DRAWS
    # Negative control: the failing setting in place of the last that passed.
    off_by_one = sum(risk_of(outcome.walked[-1]) > DELTA for outcome in outcomes)
    assert off_by_one > allowed


def test_comparing_the_mean_with_delta_would_be_caught() -> None:
    def naive(settings: Any, losses_of: Any, *, delta: float) -> WalkResult:
        passed = [s for s in settings if losses_of(s).mean() <= delta]
        steps = [Walked(setting=s, risk=0.0, p_value=0.0, passed=True) for s in passed]
        return WalkResult(tuple(steps), UNITS)

    violations = sum(risk_of(each.certified) > DELTA for each in walks(zero_one, naive))
    assert violations > most_violations(EPSILON)


@pytest.mark.parametrize("draw", [zero_one, means, rare_and_large])
def test_the_expected_loss_stays_below_delta_and_one_step_more_breaks_it(draw: Draw) -> None:
    outcomes = walks(draw, conformal_risk_control)
    risks = np.asarray([risk_of(outcome.certified) for outcome in outcomes])
    slack = 3.3 * risks.std() / np.sqrt(DRAWS)
    assert risks.mean() <= DELTA + slack
    assert risks.mean() > 0.01 - slack
    off_by_one = np.asarray([risk_of(outcome.walked[-1]) for outcome in outcomes])
    assert off_by_one.mean() > DELTA + slack


def test_conformal_counts_the_worst_so_far_where_losses_fall() -> None:
    losses = {3.0: np.asarray([0.0, 0.2] * 20), 2.0: np.asarray([0.2, 0.0] * 20)}
    outcome = conformal_risk_control(losses, losses.__getitem__, delta=0.15)
    assert [step.risk for step in outcome.walked] == pytest.approx([0.1, 0.2])
    assert [step.passed for step in outcome.walked] == [True, False]


@given(
    values=st.lists(st.floats(0, 0.3), min_size=1, max_size=8),
    delta=st.floats(0.02, 0.4),
    epsilon=st.floats(0.01, 0.5),
    method=st.sampled_from(["hoeffding-bentkus", "betting", "conformal"]),
)
def test_a_walk_stops_at_its_first_failure_and_returns_the_step_before(
    values: list[float], delta: float, epsilon: float, method: str
) -> None:
    settings = [float(len(values) - i) for i in range(len(values))]
    losses = {s: np.full(80, value) for s, value in zip(settings, values, strict=True)}
    asked: list[float] = []

    def losses_of(setting: float) -> np.ndarray:
        asked.append(setting)
        return losses[setting]

    if method == "conformal":
        outcome = conformal_risk_control(settings, losses_of, delta=delta)
    else:
        outcome = learn_then_test(
            settings,
            losses_of,
            delta=delta,
            epsilon=epsilon,
            method=method,  # type: ignore[arg-type]
        )
    assert asked == [step.setting for step in outcome.walked] == settings[: len(asked)]
    assert all(step.passed for step in outcome.walked[:-1])
    passed = [step.setting for step in outcome.walked if step.passed]
    assert (outcome.certified and outcome.certified.setting) == (passed[-1] if passed else None)
    if len(asked) < len(settings):
        assert not outcome.walked[-1].passed


def test_no_setting_that_passes_is_an_outcome_and_no_error() -> None:
    outcome = learn_then_test([2.0, 1.0], lambda _: np.ones(50), delta=0.05, epsilon=0.05)
    assert outcome.certified is None
    assert [step.passed for step in outcome.walked] == [False]
    assert outcome.n == 50


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
@pytest.mark.parametrize("field", ["delta", "epsilon"])
def test_shares_outside_their_range_are_named(field: str, value: float) -> None:
    options = {"delta": 0.05, "epsilon": 0.05} | {field: value}
    delta, epsilon = options["delta"], options["epsilon"]
    with pytest.raises(ConfigError, match=rf"{field}: .* is not in \(0, 1\)"):
        learn_then_test([1.0], lambda _: np.zeros(99), delta=delta, epsilon=epsilon)
    if field == "delta":
        with pytest.raises(ConfigError, match=r"delta: .* is not in \(0, 1\)"):
            conformal_risk_control([1.0], lambda _: np.zeros(99), delta=value)


def test_what_cannot_be_walked_is_refused() -> None:
    with pytest.raises(ConfigError, match="settings: name nothing"):
        learn_then_test([], lambda _: np.zeros(9), delta=0.1, epsilon=0.1)
    with pytest.raises(ConfigError, match="method: 'conformal' has no p-value"):
        learn_then_test([1.0], lambda _: np.zeros(9), delta=0.1, epsilon=0.1, method="conformal")
    with pytest.raises(TraceError, match="hold no loss"):
        conformal_risk_control([1.0], lambda _: np.zeros(0), delta=0.1)
    sizes = {2.0: 90, 1.0: 91}
    with pytest.raises(ConfigError, match="setting 1: has 91 losses, those before it 90"):
        learn_then_test(sizes, lambda s: np.zeros(sizes[s]), delta=0.1, epsilon=0.1)
