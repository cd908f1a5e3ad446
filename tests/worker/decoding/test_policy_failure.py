"""A policy that fails costs its own requests their exits, and nobody anything else."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pytest

from offramp.controller.features import SOFTMAX_V2, BoolArray, FeatureSchema, FloatArray
from offramp.controller.policies.protocols import ExitPolicy, FixedExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.engine.engine_config import EngineConfig
from support.models import LAYERS, make_model
from support.rows import CLOSE, RAGGED, ReplayedExits, decode, drain, shortfalls

SAMPLING = SamplingParams(max_tokens=16, ignore_eos=True)
COHORTS = Schedule(holds=(1, 3), rows=3, patience=3)
TOGETHER = Schedule(together=True, rows=3, patience=3)


@dataclass
class Failing:
    """Gives one answer, until it has been asked so often."""

    answers: int
    how: str
    answer: bool = True
    exits: tuple[int, ...] = (2, 4)
    schema: FeatureSchema | None = None
    candidates_VK: None = None
    asked: int = 0

    def leave(self, features_NF: FloatArray) -> BoolArray:
        self.asked += 1
        rows = len(features_NF)
        if self.asked <= self.answers:
            return np.full(rows, self.answer)
        if self.how == "raises":
            raise RuntimeError("no decision today")
        return np.ones(rows + 1, np.bool_)


def engine_of(family: str, schedule: Schedule = LOCKSTEP) -> AdaptiveEngine:
    config = EngineConfig(schedule=schedule)
    return AdaptiveEngine.from_pretrained(make_model(family), slots=4, config=config)


@pytest.mark.parametrize(("schedule", "how"), [(LOCKSTEP, "too many"), (COHORTS, "raises")])
def test_a_request_whose_policy_fails_goes_on_at_full_depth(
    family: str, schedule: Schedule, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(family, schedule)
    policy = Failing(5, how)
    with caplog.at_level(logging.ERROR):
        [row] = decode(engine, RAGGED[:1], SAMPLING, policy)
    assert row.exit_layers == [LAYERS, *[2] * 5, *[LAYERS] * 10]
    assert engine.decoder.failures == 1
    assert policy.asked == 6  # and never again
    assert len(caplog.records) == 1
    [again] = decode(engine_of(family), RAGGED[:1], SAMPLING, ReplayedExits(row.exit_layers))
    assert row.emitted == again.emitted


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
@pytest.mark.parametrize("schedule", [LOCKSTEP, COHORTS, TOGETHER])
def test_the_other_rows_notice_nothing(
    schedule: Schedule, kv_mode: KVMode, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of("llama", schedule)
    policies: list[ExitPolicy] = [
        Failing(3, "raises"),
        FixedExit(3),
        Failing(4, "too many"),
        FixedExit(3),
    ]
    with caplog.at_level(logging.ERROR):
        rows = drain(
            engine,
            [
                engine.submit(prompt, SAMPLING, policy, kv_mode=kv_mode)
                for prompt, policy in zip(RAGGED, policies, strict=True)
            ],
        )
    assert engine.decoder.failures == 2
    assert len(caplog.records) == 2
    assert [row.policy_failed for row in rows] == [True, False, True, False]
    model = make_model("llama")
    for row in rows:
        if kv_mode == "verify":
            assert float(shortfalls(model, row).max()) <= CLOSE
            continue
        engine = AdaptiveEngine.from_pretrained(model, config=EngineConfig(max_pending=1000))
        policy = ReplayedExits(row.exit_layers)
        [alone] = decode(engine, [list(row.request.prompt)], SAMPLING, policy, kv_mode)
        assert row.emitted == alone.emitted
    if kv_mode == "project":
        assert rows[1].exit_layers == rows[3].exit_layers == [LAYERS, *[3] * 15]


def test_rows_that_share_a_failing_policy_are_counted_once_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = engine_of("llama")
    with caplog.at_level(logging.ERROR):
        rows = decode(engine, RAGGED, SAMPLING, Failing(2, "raises"))
    assert engine.decoder.failures == len(RAGGED)
    assert len(caplog.records) == 1
    assert all(row.exit_layers[-5:] == [LAYERS] * 5 for row in rows)


def test_a_failure_while_rows_wait_leaves_their_tokens_whole(family: str) -> None:
    """It is asked after layers 2 and 4, before and after a hold, and fails at the sixth time."""
    engine = engine_of(family, COHORTS)
    rows = decode(engine, RAGGED, SAMPLING, Failing(5, "raises", answer=False, schema=SOFTMAX_V2))
    assert engine.decoder.failures > 0
    model = make_model(family)
    assert max(float(shortfalls(model, row).max()) for row in rows) <= CLOSE
