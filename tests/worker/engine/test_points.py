"""Requests that ask for time or energy run at the point of the frontier that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import RequestError
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.protocols import NeverExit, Policy, ThresholdPolicy
from offramp.controller.release.certificate import Walked
from offramp.controller.release.certified_points import Target
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.decoding.request import FULL_DEPTH, KVWish, PolicySnapshot
from offramp.worker.decoding.schedule import Schedule
from support.models import make_model
from support.releases.certificates import certificate

COSTS = CostTable(
    layer_s=1e-3, head_s=2e-3, probe_s=0, policy_s=0, fill_s=0, step_s=0, layers=5, machine=""
)
SAFE, EAGER = 0.2, 0.02
BOUNDED = certificate(
    setting=EAGER,
    risk=0.02,
    p_value=0.001,
    parameter="threshold of margin",
    walked=tuple(
        Walked(setting=setting, risk=risk, p_value=0.001, passed=True, leaves=leaves)
        for setting, risk, leaves in ((SAFE, 0.01, (0.2,)), (EAGER, 0.02, (0.8,)))
    ),
)
POLICY = ThresholdPolicy((2,), SOFTMAX_V2, "margin", EAGER)
SERVED = PolicySnapshot(7, "d" * 64, POLICY, BOUNDED)
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
FULL_MS, SAFE_MS, EAGER_MS = 7.0, 6.4, 4.6


def engine_of(costs: CostTable | None = COSTS, served: PolicySnapshot = SERVED) -> AdaptiveEngine:
    config = EngineConfig(schedule=Schedule(costs=costs))
    return AdaptiveEngine(
        make_model("llama"), slots=2, config=config, current_policy=lambda: served
    )


def depths(engine: AdaptiveEngine, wish: KVWish | None, policy: Policy | None = None) -> list[int]:
    return [event.exit_layer for event in engine.stream([5, 6, 7], SAMPLING, policy, kv_mode=wish)]


def test_a_request_runs_at_its_point() -> None:
    engine = engine_of()
    safe, eager = (depths(engine, None, replace(POLICY, threshold=t)) for t in (SAFE, EAGER))
    assert sum(safe) > sum(eager)  # they differ, or nothing is shown below
    for budget, expected in ((EAGER_MS, eager), (SAFE_MS, safe), (FULL_MS, [5] * 24)):
        assert depths(engine, Target(latency_budget_ms=budget + 1e-6)) == expected
    request = engine.submit([5, 6, 7], SAMPLING, kv_mode=Target(latency_budget_ms=SAFE_MS + 1e-6))
    other = engine.submit([5, 6, 7], SAMPLING, kv_mode=Target(latency_budget_ms=SAFE_MS + 0.1))
    assert (request.snapshot.generation, request.kv_mode) == (7, "project")
    assert request.snapshot.policy is other.snapshot.policy  # so they are asked together


def test_a_release_that_moved_offers_the_same_points() -> None:
    moved = replace(SERVED, policy=replace(POLICY, threshold=SAFE), setting=SAFE)
    for served in (SERVED, moved):
        picked = engine_of(served=served).submit(
            [5], SAMPLING, kv_mode=Target(latency_budget_ms=EAGER_MS + 1e-6)
        )
        assert (picked.snapshot.setting, picked.snapshot.policy) == (EAGER, POLICY)


def test_what_was_not_bounded_is_not_offered() -> None:
    fast = Target(latency_budget_ms=5)
    wants = replace(fast, quality=0.96)
    with pytest.raises(RequestError, match=r"offramp.latency_budget_ms.*predicted at 7 ms"):
        engine_of().submit([5], SAMPLING, kv_mode=wants)
    full = engine_of().submit([5], SAMPLING, kv_mode=Target(latency_budget_ms=8, quality=1.0))
    assert full.snapshot is FULL_DEPTH
    for served in (
        replace(SERVED, certificate=None),
        replace(SERVED, certificate=replace(BOUNDED, dtype="bfloat16")),
        PolicySnapshot(0, "", NeverExit()),
    ):
        with pytest.raises(RequestError, match="full depth at 7 ms"):
            engine_of(served=served).submit([5], SAMPLING, kv_mode=fast)


@pytest.mark.parametrize(
    ("target", "field"),
    [
        (Target(latency_budget_ms=5), "offramp.latency_budget_ms"),
        (Target(energy_weight=0.5), "offramp.energy_weight"),
    ],
)
def test_without_costs_nothing_can_be_predicted(target: Target, field: str) -> None:
    with pytest.raises(RequestError, match=r"--costs") as refused:
        engine_of(costs=None).submit([5], SAMPLING, kv_mode=target)
    assert refused.value.field == field
