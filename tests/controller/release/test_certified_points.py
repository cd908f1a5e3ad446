"""Points of a certified frontier: what each is predicted to cost, and which one a request gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import RequestError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.release.certificate import Walked
from offramp.controller.release.certified_points import (
    PricedPoint,
    Target,
    certified_points,
    certified_policies,
    certified_range,
    full_depth,
    pick,
)
from support.cost_tables import SECONDS, measured
from support.releases.certificates import certificate

EXITS = (3, 8)
LEAVES = ((0.1, 0.2), (0.3, 0.4))
SETTINGS = (0.9, 0.5)
WALKED = (
    *(
        Walked(setting=setting, risk=risk, p_value=0.001, passed=True, leaves=leaves)
        for setting, risk, leaves in zip(SETTINGS, (0.01, 0.02), LEAVES, strict=True)
    ),
    Walked(setting=0.1, risk=0.4, p_value=0.9, passed=False, leaves=(0.9, 0.1)),
)
COSTS = measured()
CERTIFICATE = certificate(
    walked=WALKED, setting=0.5, risk=0.02, p_value=0.001, parameter="threshold of margin"
)
MARGIN = ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", 0.5)
NET = MlpPolicy(
    EXITS,
    CANDIDATES_V1,
    [(np.ones((CANDIDATES_V1.width, 1), np.float32), np.zeros(1, np.float32))],
    0.5,
    np.zeros((4, 2), np.int32),
)


def by_hand(leaves: tuple[float, float], seconds: dict[str, float]) -> float:
    """Milliseconds per token: a token that stays is asked at both exits."""
    first, second = leaves
    ask = seconds["probe"] + seconds["policy"]
    layers = first * 3 + second * 8 + (1 - first - second) * 12
    fills = first * 9 + second * 4
    asked = first + 2 * (1 - first)
    fixed = seconds["step"] + seconds["head"] + seconds["build"]
    return 1e3 * (layers * seconds["layer"] + fills * seconds["fill"] + asked * ask + fixed)


@pytest.mark.parametrize(
    ("policy", "probe"),
    [(NET, {}), (MARGIN, {"probe": SECONDS["head"], "policy": 0.5, "build": 0.25})],
)
def test_a_point_costs_what_its_tokens_do_where_they_left(
    policy: Any, probe: dict[str, float]
) -> None:
    points: list[Any] = list(certified_points(policy, CERTIFICATE, COSTS))
    expected = [by_hand(leaves, SECONDS | probe) for leaves in LEAVES]
    assert [point.token_ms for point in points] == pytest.approx(expected)
    assert [point.risk for point in points] == [0.01, 0.02]
    assert [point.policy.threshold for point in points] == list(SETTINGS)
    assert {type(point.policy) for point in points} == {type(policy)}
    full = full_depth(COSTS)
    assert full.token_ms == pytest.approx(1e3 * COSTS.at(1).full_s)
    assert (full.energy, full.risk) == (1.0, 0.0)
    # Each part takes 5 J: 12 layers, head and step.
    layers = 5 * (0.1 * 3 + 0.2 * 8 + 0.7 * 12 + 0.1 * 9 + 0.2 * 4 + 2 * (0.1 + 2 * 0.9) + 3)
    if policy is NET:
        assert points[0].energy == pytest.approx(layers / (5 * 14))
    else:
        assert points[0].energy is None  # its probe's was not measured


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        (FixedExit(3), {}),
        (replace(MARGIN, threshold=0.4), {}),
        (MARGIN, {"parameter": "preference λ"}),
        (MARGIN, {"decode_mode": "replay"}),
        (MARGIN, {"walked": tuple(replace(step, leaves=()) for step in WALKED)}),
        (replace(MARGIN, schema=replace(SOFTMAX_V2, name="unpriced")), {}),
    ],
)
def test_there_are_no_points_where_the_setting_or_the_price_is_not_known(
    policy: Any, changes: dict[str, Any]
) -> None:
    assert certified_points(policy, replace(CERTIFICATE, **changes), COSTS) == ()


def test_settings_that_passed_make_policies_safest_first() -> None:
    assert certified_policies(NET, None) == certified_policies(FixedExit(3), CERTIFICATE) == {}
    found = certified_range(MARGIN, CERTIFICATE)
    assert found == {each: replace(MARGIN, threshold=each) for each in SETTINGS}
    assert found[0.5] is MARGIN
    safer = replace(MARGIN, threshold=0.9)
    assert certified_policies(safer, CERTIFICATE) == found
    assert certified_range(safer, CERTIFICATE) == {}  # nobody releases it with this certificate


def point(risk: float, token_ms: float, energy: float | None = None) -> PricedPoint:
    policy = NeverExit() if risk == 0 else MARGIN
    return PricedPoint(policy=policy, risk=risk, token_ms=token_ms, energy=energy)


POINTS = (point(0, 10, 1.0), point(0.01, 8, 0.7), point(0.03, 5, 0.5))


@pytest.mark.parametrize(
    ("target", "place"),
    [
        (Target(latency_budget_ms=10), 0),
        (Target(latency_budget_ms=9.9), 1),
        (Target(latency_budget_ms=8), 1),
        (Target(latency_budget_ms=7), 2),
        (Target(energy_weight=0.01), 0),  # 0.01 of energy is worth less than 0.01 of loss
        (Target(energy_weight=0.05), 1),
        (Target(energy_weight=0.5), 2),
        (Target(latency_budget_ms=9, energy_weight=0.01), 1),
    ],
)
def test_the_least_loss_within_the_budget_is_picked(target: Target, place: int) -> None:
    assert pick(POINTS, target) is POINTS[place]


def test_what_cannot_be_had_is_refused_with_what_can() -> None:
    with pytest.raises(RequestError, match=r"latency_budget_ms.* 5 ms, full depth at 10 ms"):
        pick(POINTS, Target(latency_budget_ms=4.9))
    unknown = (point(0, 10), point(0.01, 8))
    assert pick(unknown, Target(latency_budget_ms=9)) is unknown[1]
    with pytest.raises(RequestError, match=r"energy_weight.*no energy"):
        pick(unknown, Target(energy_weight=0.1))


def test_a_table_of_constants_prices_any_probe() -> None:
    constants = CostTable(
        layer_s=1e-3, head_s=2e-3, probe_s=0, policy_s=0, fill_s=0, step_s=0, layers=12, machine=""
    )
    found = [each.token_ms for each in certified_points(MARGIN, CERTIFICATE, constants)]
    assert found == pytest.approx([0.3 + 1.6 + 8.4 + 2, 0.9 + 3.2 + 3.6 + 2])
