"""A failing policy costs speed, never a request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from offramp.controller.features import STATE_V1, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit
from offramp.worker.decoding.asking.guard import PolicyGuard

FEATURES = np.ones((3, STATE_V1.width), np.float32)


@dataclass
class Scripted:
    answer: Callable[[FloatArray], Any]
    exits: tuple[int, ...] = (1,)
    schema: FeatureSchema | None = STATE_V1
    candidates_VK: IntArray | None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return self.answer(features_NF)  # type: ignore[no-any-return]  # wrong on purpose


def raise_error(features_NF: FloatArray) -> BoolArray:
    raise RuntimeError("out of luck")


def mlp() -> MlpPolicy:
    rng = np.random.default_rng(0)
    layers = [(STATE_V1.width, 4), (4, 1)]
    weights = [
        (rng.standard_normal(shape).astype(np.float32), np.zeros(shape[1], np.float32))
        for shape in layers
    ]
    return MlpPolicy((1,), STATE_V1, weights)


BAD: dict[str, Callable[[FloatArray], Any]] = {
    "raises": raise_error,
    "None": lambda f: None,
    "list": lambda f: [True] * len(f),
    "integers": lambda f: np.ones(len(f), np.int64),
    "floats": lambda f: np.full(len(f), np.nan),
    "too few": lambda f: np.ones(len(f) - 1, np.bool_),
    "too many": lambda f: np.ones((len(f), 1), np.bool_),
    "scalar": lambda f: np.bool_(True),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_unusable_answer_is_a_failure(kind: str) -> None:
    guard = PolicyGuard()
    assert guard.decide(Scripted(BAD[kind]), FEATURES) is None
    assert guard.failures == 1


def test_a_usable_answer_passes_through() -> None:
    guard = PolicyGuard()
    leave_N = np.asarray([True, False, True])
    assert guard.decide(Scripted(lambda f: leave_N), FEATURES) is leave_N
    assert guard.decide(FixedExit(1), np.empty((2, 0), np.float32)).tolist() == [True, True]  # type: ignore[union-attr]  # None would fail here
    assert guard.failures == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 3])
def test_features_that_are_not_finite_are_a_failure(value: float, rows: int) -> None:
    guard = PolicyGuard()
    features = FEATURES[:rows].copy()
    features[-1, 2] = value
    assert guard.decide(mlp(), features) is None
    assert guard.decide(Scripted(lambda f: np.ones(len(f), np.bool_)), features) is None
    assert guard.failures == 2


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("rows", [1, 3])
def test_an_mlp_whose_logits_overflow_is_a_failure(rows: int) -> None:
    guard = PolicyGuard()
    policy = mlp()
    huge = [(np.full_like(w, 3e38), b) for w, b in policy.weights]
    overflowing = MlpPolicy((1,), STATE_V1, huge)
    assert guard.decide(overflowing, FEATURES[:rows]) is None
    assert guard.decide(policy, FEATURES[:rows]) is not None


def test_each_failing_policy_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    guard = PolicyGuard()
    first, second = Scripted(raise_error), Scripted(raise_error)
    with caplog.at_level(logging.ERROR):
        for policy in (first, second, first, first):
            guard.decide(policy, FEATURES)
    assert guard.failures == 4
    assert len(caplog.records) == 2
    assert "out of luck" in caplog.text


def test_interrupts_are_not_swallowed() -> None:
    def interrupt(features_NF: FloatArray) -> BoolArray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PolicyGuard().decide(Scripted(interrupt), FEATURES)
