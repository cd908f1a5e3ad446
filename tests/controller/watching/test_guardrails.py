"""The alarms: how soon they fire, how rarely they are wrong, and what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.watching.guardrails import Guardrails, MeanAlarm, PolicyWatch


def observations_until(alarm: MeanAlarm, values: Any) -> int | None:
    return next((n for n, value in enumerate(values, start=1) if alarm.tell(value)), None)


@pytest.mark.parametrize(("rate", "most"), [(1.0, 30), (0.6, 90), (0.4, 400)])
def test_a_crossed_bound_is_noticed_soon(rate: float, most: int) -> None:
    for seed in range(20):
        draws = np.random.default_rng(seed).random(most) < rate
        assert observations_until(MeanAlarm(0.2), draws) is not None


def test_a_good_past_hides_nothing() -> None:
    alarm = MeanAlarm(0.1)
    assert observations_until(alarm, np.zeros(20_000)) is None
    assert (observations_until(alarm, np.ones(100)) or 100) < 30


def test_a_bound_that_is_just_kept_hardly_ever_alarms() -> None:
    # Promised: once in a million observations, on average; so 5 % of 50,000 at the very most.
    alarms = sum(
        observations_until(MeanAlarm(0.2), np.random.default_rng(seed).random(5_000) < 0.2)
        is not None
        for seed in range(100)
    )
    assert alarms <= 2


def test_the_bound_is_what_makes_the_alarm() -> None:
    draws = np.random.default_rng(0).random(3_000) < 0.2
    assert observations_until(MeanAlarm(0.1), draws) is not None  # the control for the above


@pytest.mark.parametrize(
    "values",
    [
        {"max_disagreement": 0.0},
        {"max_disagreement": 1.0},
        {"max_failures": float("nan")},
        {"min_exits": -0.1},
        {"max_token_ms": 0},
    ],
)
def test_a_bound_out_of_range_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Guardrails(**values)


def watched(**bounds: Any) -> tuple[PolicyWatch, list[str]]:
    said: list[str] = []
    return PolicyWatch(Guardrails(**bounds), said.append), said


def test_garbage_is_told_once_and_in_a_sentence() -> None:
    watch, said = watched()
    for _ in range(200):
        watch.judge(False)
    assert said == [watch.tripped]
    assert said[0].startswith("full depth disagrees with 100% of the last ")
    assert (watch.tally.audited, watch.tally.disagreed) == (200, 200)


def test_a_policy_that_fails_is_told_of() -> None:
    watch, said = watched()
    for _ in range(20):
        watch.note_token(12, 12)
        watch.note_failure()
    assert said[0].startswith("the policy failed ")


def test_exits_that_collapse_are_told_of_only_if_asked_for() -> None:
    watch, said = watched(min_exits=0.3)
    silent, nothing = watched()
    for _ in range(300):
        watch.note_token(12, 12)
        silent.note_token(12, 12)
    assert said[0].startswith("0.0% of the last ")
    assert nothing == []


def test_late_tokens_are_told_of() -> None:
    watch, said = watched(max_token_ms=20)
    for _ in range(100):
        watch.note_gap(0.019)
    assert said == []
    for _ in range(100):
        watch.note_gap(0.021)
    assert "took more than 20 ms" in said[0]


@pytest.mark.parametrize(("accepted", "trips"), [(0, True), (1, True), (2, False), (4, False)])
def test_a_drafter_that_loses_is_told_of(accepted: int, trips: bool) -> None:
    watch, said = watched()
    for _ in range(3_000):
        watch.note_cycle(spent=4 * 0.5, saved=accepted)
    assert bool(said) == trips
    assert all("drafting is slower than full depth" in each for each in said)
