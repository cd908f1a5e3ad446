"""Policies that route rows from exit to exit, and policies that learn while they serve.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from offramp.controller.features import OUTLOOK_V1, STATE_V1, BoolArray, FeatureSchema, FloatArray
from offramp.controller.policies.protocols import (
    ExitPolicy,
    IndexArray,
    RoutingPolicy,
    ThresholdPolicy,
    Verdict,
)
from offramp.worker import AdaptiveEngine, EngineConfig, KVMode, SamplingParams
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from support.models import LAYERS, make_model
from support.rows import ALL_EXITS, RAGGED, counted_tokens, decode, drain, full_logits, shortfalls

SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
COHORTS = Schedule(holds=(2,), rows=2, patience=3)
TOGETHER = Schedule(together=True, rows=3, patience=3)


@dataclass
class Router:
    """Goes where its functions say."""

    begin: Callable[[FloatArray], int]
    go: Callable[[int, FloatArray, FloatArray], int]
    exits: tuple[int, ...] = ALL_EXITS
    schema: FeatureSchema | None = None
    candidates_VK: None = None
    asked: list[int] = field(default_factory=list)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        return np.array([self.begin(row_C) for row_C in outlook_NC])

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        self.asked.append(self.exits[here])
        rows = zip(features_NF, outlook_NC, strict=True)
        return np.array([self.go(here, *row) for row in rows])


@dataclass
class LearningExit:
    """Leaves at random and keeps what it is told."""

    chance: float = 0.6
    exits: tuple[int, ...] = (1, 3)
    schema: FeatureSchema | None = STATE_V1
    candidates_VK: None = None
    told: list[Verdict] = field(default_factory=list)
    shown: list[FloatArray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        leave_N = self.rng.random(len(features_NF)) < self.chance
        self.shown += list(features_NF[leave_N].copy())
        return leave_N

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        self.told += verdicts


def engine_of(slots: int = 4, schedule: Schedule = LOCKSTEP, **config: Any) -> AdaptiveEngine:
    settings = EngineConfig(schedule=schedule, **config)
    return AdaptiveEngine.from_pretrained(make_model("llama"), slots=slots, config=settings)


def test_the_protocols_tell_policies_apart() -> None:
    router = Router(lambda _: 0, lambda here, *_: here)
    assert isinstance(router, RoutingPolicy)
    assert not isinstance(router, ExitPolicy)
    assert not isinstance(LearningExit(), RoutingPolicy)


def test_a_jump_skips_the_probes_between() -> None:
    engine = engine_of()
    router = Router(lambda _: 0, lambda here, *_: 3 if here == 0 else here)
    [row] = decode(engine, RAGGED[:1], SAMPLING, router)
    assert set(router.asked) == {ALL_EXITS[0], ALL_EXITS[3]}
    assert row.exit_layers == [LAYERS, *[ALL_EXITS[3]] * 23]


@pytest.mark.parametrize(
    "schedule", [LOCKSTEP, COHORTS, TOGETHER], ids=["lock-step", "cohorts", "together"]
)
@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
def test_a_router_that_asks_at_every_exit_is_the_gate_it_copies(
    kv_mode: KVMode, schedule: Schedule
) -> None:
    column = STATE_V1.index("update_cosine")
    threshold = 0.05  # in this random model some rows leave at each exit
    gate = ThresholdPolicy(ALL_EXITS, STATE_V1, "update_cosine", threshold)

    def go(here: int, features_F: FloatArray, _: FloatArray) -> int:
        return here if features_F[column] >= threshold else here + 1

    router = Router(lambda _: 0, go, schema=STATE_V1)
    gated = decode(engine_of(schedule=schedule), RAGGED, SAMPLING, gate, kv_mode)
    routed = decode(engine_of(schedule=schedule), RAGGED, SAMPLING, router, kv_mode)
    assert [row.emitted for row in routed] == [row.emitted for row in gated]
    assert [row.exit_layers for row in routed] == [row.exit_layers for row in gated]
    assert len({layer for row in gated for layer in row.exit_layers}) > 2


@pytest.mark.parametrize("drafts", [1, 3])
def test_running_to_the_end_at_once_means_verify_now(drafts: int) -> None:
    """A static draft length, as in LayerSkip: so many drafts, then one pass for all."""
    engine = engine_of(slots=1)
    pending = OUTLOOK_V1.index("pending")
    most = engine.config.max_pending

    def begin(outlook_C: FloatArray) -> int:
        return 0 if round(float(outlook_C[pending]) * most) < drafts else len(ALL_EXITS)

    router = Router(begin, lambda here, *_: here)
    cycles = []
    confirm = engine._emitter._confirm_greedily

    def counting(result: Any) -> None:
        cycles.append((len(result.row.emitted), len(result.row.drafts)))
        confirm(result)

    engine._emitter._confirm_greedily = counting  # type: ignore[method-assign]
    with counted_tokens(engine) as counts:
        [row] = decode(engine, RAGGED[:1], SAMPLING, router, "verify")
    # The last cycles are cut short by max_tokens.
    whole = {made for emitted, made in cycles if emitted + drafts + 1 < SAMPLING.max_tokens}
    assert whole == {drafts}
    assert float(shortfalls(engine.model, row).max()) < 1e-4
    prompt = len(RAGGED[0])
    assert counts[0] - prompt >= len(row.emitted) - 1
    assert sum(counts.values()) - prompt * LAYERS == row.layer_calls


@pytest.mark.parametrize(
    "schedule", [LOCKSTEP, COHORTS, TOGETHER], ids=["lock-step", "cohorts", "together"]
)
def test_verdicts_of_drafts_are_what_was_accepted(schedule: Schedule) -> None:
    engine, policy = engine_of(schedule=schedule), LearningExit()
    rows = decode(engine, RAGGED, SAMPLING, policy, "verify")
    assert sum(verdict.agreed for verdict in policy.told) == sum(r.drafts_accepted for r in rows)
    rejected = sum(not verdict.agreed for verdict in policy.told)
    assert rejected > 0
    assert {verdict.exit_index for verdict in policy.told} == {0, 1}
    shown = {features_F.tobytes() for features_F in policy.shown}
    assert all(verdict.features_F.tobytes() in shown for verdict in policy.told)


@pytest.mark.parametrize(
    "schedule", [LOCKSTEP, COHORTS, TOGETHER], ids=["lock-step", "cohorts", "together"]
)
def test_verdicts_of_deferred_tokens_are_full_depths(schedule: Schedule) -> None:
    engine, policy = engine_of(schedule=schedule), LearningExit()
    [row] = decode(engine, RAGGED[:1], SAMPLING, policy, "defer")
    best = full_logits(engine.model, row).argmax(-1).tolist()
    early = [n for n, layer in enumerate(row.exit_layers) if layer < LAYERS]
    expected = [row.emitted[n] == best[n] for n in early]
    told = [verdict.agreed for verdict in policy.told]
    assert told == expected[: len(told)]
    assert len(expected) - len(told) <= engine.config.max_pending  # the last pass may not come
    assert 0 < sum(told) < len(told)


def test_projected_tokens_have_no_verdict() -> None:
    policy = LearningExit()
    decode(engine_of(), RAGGED, SAMPLING, policy, "project")
    assert policy.told == []


def refuse(*_: Any) -> Any:
    raise RuntimeError("no way")


@pytest.mark.parametrize(
    ("begin", "go"),
    [
        (refuse, lambda here, *_: here),
        (lambda _: len(ALL_EXITS) + 1, lambda here, *_: here),
        (lambda _: -1, lambda here, *_: here),
        (lambda _: 1, refuse),
        (lambda _: 1, lambda here, *_: 0),
        (lambda _: 1, lambda here, *_: 0.5),
    ],
    ids=["raises", "beyond", "before", "raises later", "goes back", "between"],
)
def test_a_router_that_fails_costs_its_request_the_exits(
    begin: Any, go: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of()
    with caplog.at_level(logging.ERROR):
        rows = decode(engine, RAGGED, SAMPLING, Router(begin, go))
    assert all(set(row.exit_layers) == {LAYERS} for row in rows)
    assert engine.decoder.failures == len(RAGGED)
    assert len(caplog.records) == 1


def test_a_policy_that_fails_to_learn_disturbs_nobody() -> None:
    class Forgetful(LearningExit):
        def learn(self, verdicts: Sequence[Verdict]) -> None:
            raise RuntimeError("what was that?")

    expected = decode(engine_of(), RAGGED, SAMPLING, LearningExit(), "verify")
    engine = engine_of()
    rows = decode(engine, RAGGED, SAMPLING, Forgetful(), "verify")
    assert [row.emitted for row in rows] == [row.emitted for row in expected]
    assert engine.decoder.guard.failures > 0


def test_the_outlook_says_where_a_row_is() -> None:
    engine = engine_of(slots=2)
    seen: list[FloatArray] = []

    def begin(outlook_C: FloatArray) -> int:
        seen.append(outlook_C.copy())
        return 1

    router = Router(begin, lambda here, *_: here)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    decode(engine, RAGGED[:3], sampling, router, "defer")
    column = {name: np.array(seen)[:, i] for i, name in enumerate(OUTLOOK_V1.columns)}
    assert column["step"].min() == 1 / 256
    assert column["left"].max() == 11 / 256
    np.testing.assert_allclose(column["step"] + column["left"], 12 / 256)
    most = engine.config.max_pending
    assert column["pending"].tolist()[0] == 0
    assert column["pending"].max() == pytest.approx((most - 1) / most)
    assert column["debt"][0] == 0
    skipped = 1 - ALL_EXITS[1] / LAYERS
    later = column["debt"][column["step"] > 3 / 256]
    assert (later > 0).all()
    assert later.max() < skipped
    assert {round(float(depth), 6) for depth in column["last_depth"]} == {1, 1 - skipped}
    assert set(column["active"].tolist()) == {0.5, 1.0}
    assert set(column["waiting"].tolist()) == {0.0, 0.5}


def scattered() -> Router:
    """Goes to exits that hang on what it reads of a row, so that rows part ways and meet again."""

    def begin(outlook_C: FloatArray) -> int:
        return round(float(outlook_C[0]) * 256) % (len(ALL_EXITS) + 1)

    def go(here: int, features_F: FloatArray, outlook_C: FloatArray) -> int:
        return min(here + int(np.abs(features_F[:4]).sum() * 5) % 3, len(ALL_EXITS))

    return Router(begin, go, schema=STATE_V1)


@pytest.mark.parametrize(
    "schedule", [LOCKSTEP, COHORTS, TOGETHER], ids=["lock-step", "cohorts", "together"]
)
@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
def test_rows_that_are_asked_together_go_where_each_goes_alone(
    kv_mode: KVMode, schedule: Schedule
) -> None:
    alone = [decode(engine_of(), [prompt], SAMPLING, scattered(), kv_mode)[0] for prompt in RAGGED]
    together = decode(engine_of(schedule=schedule), RAGGED, SAMPLING, scattered(), kv_mode)
    assert [row.emitted for row in together] == [row.emitted for row in alone]
    if schedule is LOCKSTEP and kv_mode != "verify":
        assert [row.exit_layers for row in together] == [row.exit_layers for row in alone]
    assert len({layer for row in together for layer in row.exit_layers}) > 2


def test_rows_at_one_exit_are_one_question() -> None:
    engine, router = engine_of(), Router(lambda _: 1, lambda here, *_: here, schema=STATE_V1)
    sizes: list[int] = []

    def counting(here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        sizes.append(len(features_NF))
        return np.full(len(features_NF), here)

    router.route = counting  # type: ignore[method-assign]
    decode(engine, RAGGED, SAMPLING, router)
    assert max(sizes) == len(RAGGED)
    assert len(sizes) < 2 * SAMPLING.max_tokens


def test_a_router_that_fails_for_one_row_fails_for_that_row_alone() -> None:
    left = OUTLOOK_V1.index("left")

    def go(here: int, features_F: FloatArray, outlook_C: FloatArray) -> int:
        if round(float(outlook_C[left]) * 256) == 9:
            raise RuntimeError("nine left")
        return here

    engine, router = engine_of(), Router(lambda _: 1, go)
    long, short = (SamplingParams(max_tokens=most, ignore_eos=True) for most in (16, 8))
    requests = [
        engine.submit(prompt, sampling, policy=router)
        for prompt, sampling in zip(RAGGED, (long, short, short, short), strict=True)
    ]
    failing, *others = drain(engine, requests)
    assert failing.exit_layers[1:6] == [ALL_EXITS[1]] * 5
    assert failing.exit_layers[-8:] == [LAYERS] * 8
    assert all(row.exit_layers[1:] == [ALL_EXITS[1]] * 7 for row in others)
    assert engine.decoder.failures == 1
