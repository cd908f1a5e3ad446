"""Whatever rows join, leave and wait, each emits what it emits alone with the same exits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.protocols import (
    ExitPolicy,
    FixedExit,
    IndexArray,
    Policy,
    ThresholdPolicy,
)
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import KVMode, Request
from offramp.worker.decoding.schedule import LOCKSTEP, Launch, Schedule
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.profiling.samples import random_policy
from support.models import FAMILIES, LAYERS, VOCAB, make_model
from support.rows import ALL_EXITS, CLOSE, RandomExit, ReplayedExits, drain, ends_right, shortfalls

END_TOKENS = frozenset({4, 21, 46, 77, 90})
TOGETHER = Schedule(together=True, rows=2, patience=3)
CANDIDATES_VK = np.tile(np.arange(6, dtype=np.int32), (VOCAB, 1))
model_of = cache(make_model)


@dataclass(frozen=True)
class RandomPlan:
    """A request, and when it comes and perhaps goes."""

    prompt: tuple[int, ...]
    max_tokens: int
    kv_mode: KVMode
    policy: int
    submitted: int
    cancelled: int | None


plans = st.builds(
    RandomPlan,
    prompt=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12).map(tuple),
    max_tokens=st.integers(1, 16),
    kv_mode=st.sampled_from(["project", "defer", "verify"]),
    policy=st.integers(0, 5),
    submitted=st.integers(0, 12),
    cancelled=st.none() | st.none() | st.integers(1, 25),
)


def constants(layer_s: float) -> CostTable:
    """Costs that no number of rows changes; beside a cheap layer the head makes drafts dear."""
    return CostTable(
        layer_s=layer_s,
        head_s=1,
        probe_s=0,
        policy_s=0,
        fill_s=0,
        step_s=0,
        layers=LAYERS,
        machine="",
    )


schedules = (
    st.builds(
        lambda holds, rows, patience: Schedule(
            holds=tuple(sorted(holds)), rows=rows, patience=patience
        ),
        st.sets(st.sampled_from(ALL_EXITS)),
        st.integers(1, 4),
        st.integers(0, 5),
    )
    | st.builds(
        lambda rows, patience: Schedule(together=True, rows=rows, patience=patience),
        st.integers(1, 5),
        st.integers(0, 5),
    )
    | st.builds(
        lambda layer_s, patience: Schedule(costs=constants(layer_s), patience=patience),
        st.sampled_from([0.001, 1.0]),
        st.integers(0, 5),
    )
)


def run(engine: AdaptiveEngine, plan: list[RandomPlan], seed: int) -> list[Sequence]:
    """The rows of the requests that were not cancelled in time."""
    policies: list[ExitPolicy] = [
        RandomExit(0.2, seed),
        RandomExit(0.4, seed + 1),
        RandomExit(0.7, seed + 2, exits=(LAYERS - 1,)),
        ThresholdPolicy((1, 2, 4), SOFTMAX_V2, "margin", 0.2),
        ThresholdPolicy((1, 3), CANDIDATES_V1, "margin", 0.3, CANDIDATES_VK),
        random_policy(CANDIDATES_V1, (1, 2, 4), CANDIDATES_VK),
    ]
    finished: dict[str, Sequence] = {}
    requests: dict[RandomPlan, Request] = {}
    step = 0
    while step < 26 or engine.load != (0, 0):
        for each in plan:
            if each.submitted == step:
                requests[each] = engine.submit(
                    list(each.prompt),
                    SamplingParams(max_tokens=each.max_tokens),
                    policies[each.policy],
                    kv_mode=each.kv_mode,
                )
            if each.cancelled == step and each in requests:
                engine.cancel(requests[each].id)
        engine.step(finished)
        step += 1
        assert step < 3000
    return list(finished.values())


def alone(model: Any, row: Sequence) -> tuple[Sequence, list[torch.Tensor]]:
    """The same request with the same exits in an engine of its own, and its logits."""
    engine = AdaptiveEngine(model, slots=1, config=EngineConfig(max_pending=1000))
    engine.stack.eos_tokens = END_TOKENS
    logits: list[torch.Tensor] = []
    plain = engine.stack.logits

    def spied(x_ND: torch.Tensor) -> torch.Tensor:
        logits.append(plain(x_ND)[-1])
        return logits[-1][None]

    engine.stack.logits = spied  # type: ignore[method-assign]
    request = row.request
    policy = ReplayedExits(row.exit_layers)
    again = engine.submit(request.prompt, request.sampling, policy, kv_mode=request.kv_mode)
    return drain(engine, [again])[0], logits


def assert_as_alone(model: Any, row: Sequence) -> None:
    """Equal tokens, up to a tie of two float32 logits within 1e-4."""
    other, logits = alone(model, row)
    for index, (ours, theirs) in enumerate(zip(row.emitted, other.emitted, strict=False)):
        if ours != theirs:
            assert float(logits[index][theirs] - logits[index][ours]) <= CLOSE
            return
    assert (row.emitted, row.exit_layers) == (other.emitted, other.exit_layers)
    assert row.finish_reason == other.finish_reason


@dataclass
class LeavesWhilePending:
    """Routes by what the outlook says of the row alone: leaves while little is pending."""

    exits: tuple[int, ...] = (2,)
    schema: None = None
    candidates_VK: None = None

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        return (outlook_NC[:, OUTLOOK_V1.index("pending")] > 0.5).astype(np.int64)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        return np.full(len(features_NF), here)


@pytest.mark.parametrize("policy", [FixedExit(2), LeavesWhilePending()])
@pytest.mark.parametrize("schedule", [Schedule(holds=(2,), rows=2, patience=2), TOGETHER])
def test_which_tokens_go_deep_does_not_depend_on_the_neighbours(
    policy: Policy, schedule: Schedule
) -> None:
    model = model_of("gpt2")
    config = EngineConfig(kv_mode="defer", max_pending=3, schedule=schedule)
    lone, shared = (AdaptiveEngine(model, slots=slots, config=config) for slots in (1, 2))
    caught_up: list[Sequence] = []
    plain = shared._roster.catch_up

    def spied(launch: Launch[Sequence]) -> list[Sequence]:
        caught_up.extend(found := plain(launch))
        return found

    shared._roster.catch_up = spied  # type: ignore[method-assign]
    for seed in range(12):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(1, VOCAB, size=rng.choice([1, 2, 9])).tolist() for _ in range(7)]
        asked = [
            SamplingParams(max_tokens=int(rng.choice([1, 2, 7, 20])), ignore_eos=True)
            for _ in prompts
        ]
        pairs = list(zip(prompts, asked, strict=True))
        rows = drain(shared, [shared.submit(prompt, how, policy) for prompt, how in pairs])
        for row, (prompt, how) in zip(rows, pairs, strict=True):
            [completion] = lone.generate([prompt], how, policy)
            assert row.exit_layers == completion.exit_layers
            assert row.emitted == completion.token_ids
    # In cohorts neighbours did take pending tokens along, or nothing was tested.
    assert bool(caught_up) == (not schedule.together)


@pytest.mark.parametrize("layer_s", [1.0, 0.001])
def test_no_exits_where_they_do_not_pay_and_only_in_verify(layer_s: float) -> None:
    engine = AdaptiveEngine(
        model_of("llama"), slots=4, config=EngineConfig(schedule=Schedule(costs=constants(layer_s)))
    )
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    modes: list[KVMode] = ["project", "verify", "defer", "verify"]
    requests = [
        engine.submit([5, 17, 33 + n], sampling, FixedExit(1), kv_mode=mode)
        for n, mode in enumerate(modes)
    ]
    project, verify, defer, other = drain(engine, requests)
    assert set(project.exit_layers[1:]) == {1}
    assert set(defer.exit_layers[1:]) == {1, LAYERS}  # by ``max_pending`` alone
    assert defer.exit_layers.index(LAYERS, 1) == 1 + engine.config.max_pending
    drafts = verify.drafts_made + other.drafts_made
    assert (drafts > 0) == (layer_s == 1)
    for row in (verify, other):
        assert float(shortfalls(engine.model, row).max()) <= CLOSE


def test_a_row_cancelled_while_it_waits_is_forgotten() -> None:
    model = model_of("llama")
    schedule = Schedule(together=True, rows=3, patience=50)
    engine = AdaptiveEngine(model, slots=3, config=EngineConfig(schedule=schedule, max_pending=9))
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    drafting = engine.submit([5, 17, 33], sampling, FixedExit(2), kv_mode="verify")
    waiting = engine.submit([9, 9, 1], sampling, kv_mode="verify")
    engine.step()
    engine.step()
    [row] = [row for row in engine._roster.rows if row.request is waiting]
    assert row.undecided  # it has no exits, and waits where the other drafts
    assert row.depth == 2
    engine.cancel(waiting.id)
    [kept] = drain(engine, [drafting])
    assert float(shortfalls(model, kept).max()) <= CLOSE
    assert kept.drafts_made > 0


def test_rows_are_verified_in_the_same_launches() -> None:
    """Rows that begin at different times, alone each in a deep pass of its own: together in one."""
    deep = {}
    for schedule in (LOCKSTEP, Schedule(together=True, rows=4, patience=8)):
        engine = AdaptiveEngine(model_of("llama"), slots=4, config=EngineConfig(schedule=schedule))
        passes: list[int] = []
        engine.stack.blocks[-1].register_forward_hook(
            lambda _, __, out, passes=passes: passes.append(out.shape[0])
        )
        finished: dict[str, Sequence] = {}
        policy = StaticDraft(layer=2, length=3)
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        for row in range(4):
            engine.submit([5 + row, 17], sampling, policy, kv_mode="verify")
            engine.step(finished)
        passes.clear()
        while engine.load != (0, 0):
            engine.step(finished)
        deep[schedule.together] = passes
        assert all(float(shortfalls(engine.model, row).max()) <= CLOSE for row in finished.values())
    assert len(deep[True]) < 0.6 * len(deep[False])
    assert np.mean(deep[True]) > 1.5 * np.mean(deep[False])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(list(FAMILIES)),
    plan=st.lists(plans, min_size=1, max_size=7, unique=True),
    schedule=schedules,
    slots=st.integers(1, 4),
    prefill_tokens=st.integers(1, 7),
    max_pending=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_no_row_is_disturbed_by_the_others(
    family: str,
    plan: list[RandomPlan],
    schedule: Schedule,
    slots: int,
    prefill_tokens: int,
    max_pending: int,
    seed: int,
) -> None:
    model = model_of(family)
    config = EngineConfig(schedule=schedule, prefill_tokens=prefill_tokens, max_pending=max_pending)
    engine = AdaptiveEngine(model, slots=slots, config=config)
    engine.stack.eos_tokens = END_TOKENS
    rows = run(engine, plan, seed)
    assert len(rows) >= sum(each.cancelled is None for each in plan)
    for row in rows:
        assert ends_right(row, END_TOKENS)
        if row.request.kv_mode == "verify":
            assert float(shortfalls(model, row).max()) <= CLOSE
        else:
            assert_as_alone(model, row)
