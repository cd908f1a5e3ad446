"""Waves whose rows come from different depths and slots: the cases that random runs rarely meet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, BoolArray, FloatArray
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.profiling.samples import random_policy
from support.models import VOCAB, make_model
from support.rows import ALL_EXITS, CLOSE, decode, drain, shortfalls

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)


@dataclass
class Answers:
    """Answers in order; stays once they are used up."""

    answers: Iterator[bool]
    exits: tuple[int, ...] = ALL_EXITS
    schema: None = None
    candidates_VK: None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return np.array([next(self.answers, False) for _ in features_NF])


def answers(text: str) -> Answers:
    """s stays, L leaves."""
    return Answers(iter([letter == "L" for letter in text]))


@pytest.mark.parametrize("others", ["LLssss", "LLsssL"])
@pytest.mark.parametrize("kv_mode", ["defer", "verify"])
def test_a_put_off_token_deeper_than_the_stage_keeps_its_entries(
    kv_mode: KVMode, others: str
) -> None:
    """The first row leaves after layer 4; then the others launch from layer 3, with it along.

    It may join at layer 4 only; in "LLssss" they stay to the end, in "LLsssL" they leave before.
    """
    model = make_model("llama")
    schedule = Schedule(holds=(1, 3), rows=2, patience=1)
    engine = AdaptiveEngine.from_pretrained(model, config=EngineConfig(schedule=schedule))
    requests = [
        engine.submit(prompt, SAMPLING, answers(text), kv_mode=mode)
        for prompt, text, mode in (
            ([5, 17, 33, 2, 41], "sssL", kv_mode),
            ([7, 8, 9], others, "project"),
            ([60, 3, 60], others, "project"),
        )
    ]
    [row, *_] = drain(engine, requests)
    assert row.exit_layers.count(4) == 1 or row.drafts_made == 1
    # Only one token of the row was postponed, and its entries were completed: full depth.
    start = 2 if kv_mode == "defer" else 0  # a deferred token itself is layer 4's
    assert float(shortfalls(model, row)[start:].max()) <= CLOSE


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_rows_that_changed_slots_while_they_waited_are_judged_by_their_own_state(
    threshold: float,
) -> None:
    """The first row ends while the other two wait; the last one then moves before the second."""
    model = make_model("llama")
    policy = ThresholdPolicy((4,), SOFTMAX_V2, "margin", threshold)
    schedule = Schedule(holds=(2,), rows=3, patience=9)
    engine = AdaptiveEngine.from_pretrained(model, config=EngineConfig(schedule=schedule))
    prompts = [[7, 8], [5, 17, 33, 2, 41], [60, 3, 60]]
    short = SamplingParams(max_tokens=5, ignore_eos=True)
    requests = [engine.submit(prompts[0], short, FixedExit(1))]
    requests += [engine.submit(prompt, SAMPLING, policy) for prompt in prompts[1:]]
    for row in drain(engine, requests)[1:]:
        [alone] = decode(
            AdaptiveEngine.from_pretrained(model), [list(row.request.prompt)], SAMPLING, policy
        )
        assert row.emitted == alone.emitted
        assert row.exit_layers == alone.exit_layers


COMPANY = [[5, 17, 33, 2, 41], [60, 3, 60], [7, 8, 9, 7, 8], [12], [80, 4, 22, 80]]


def parted(schedule: Schedule) -> list[tuple[bool, list[int]]]:
    """Of rows under one MLP: whether each emits and leaves as it does alone, and its exits."""
    model = make_model("llama")
    table_VK = np.argsort(np.random.default_rng(3).random((VOCAB, VOCAB)))[:, :8].astype(np.int32)
    policy = random_policy(CANDIDATES_V1, (1, 2, 3, 4), table_VK)
    policy.threshold = 6.0
    config = EngineConfig(schedule=schedule)
    rows = decode(AdaptiveEngine.from_pretrained(model, config=config), COMPANY, SAMPLING, policy)
    single = AdaptiveEngine.from_pretrained(model)
    alone = [decode(single, [prompt], SAMPLING, policy)[0] for prompt in COMPANY]
    return [
        ((row.emitted, row.exit_layers) == (one.emitted, one.exit_layers), row.exit_layers)
        for row, one in zip(rows, alone, strict=True)
    ]


COHORTS = Schedule(holds=(2,), rows=3, patience=2)


@pytest.mark.parametrize("schedule", [LOCKSTEP, COHORTS])
def test_rows_decided_in_one_call_leave_where_each_leaves_alone(schedule: Schedule) -> None:
    found = parted(schedule)
    assert all(is_same for is_same, _ in found)
    left = {layer for _, exits in found for layer in exits[1:]}
    assert {2, 3, 4, 5} <= left, "they part at several depths"


def test_a_probe_taken_from_rows_that_wait_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("offramp.worker.decoding.asking.grouping._is_underway", lambda group: False)
    assert not all(is_same for is_same, _ in parted(COHORTS))


def test_a_row_cancelled_while_it_waits_leaves_its_company_alone() -> None:
    model = make_model("llama")
    schedule = Schedule(holds=(2,), rows=4, patience=9)
    engine = AdaptiveEngine.from_pretrained(model, config=EngineConfig(schedule=schedule))
    policy = ThresholdPolicy((1, 4), SOFTMAX_V2, "margin", 0.2)
    cancelled = engine.submit([9, 9, 1], SAMPLING, policy)
    kept = engine.submit([5, 17, 33, 2, 41], SAMPLING, policy)
    for _ in range(3):
        engine.step()
    engine.cancel(cancelled.id)
    [row] = drain(engine, [kept])
    [alone] = decode(AdaptiveEngine.from_pretrained(model), [list(kept.prompt)], SAMPLING, policy)
    assert (row.emitted, row.exit_layers) == (alone.emitted, alone.exit_layers)


def test_a_cache_that_grows_under_open_tokens_keeps_them() -> None:
    model = make_model("llama")
    long = SamplingParams(max_tokens=150, ignore_eos=True)
    config = EngineConfig(kv_mode="verify", schedule=Schedule(holds=(2,), rows=2, patience=2))
    engine = AdaptiveEngine.from_pretrained(model, config=config)
    finished: dict[str, Any] = {}
    request = engine.submit([5, 6], long, FixedExit(4))
    engine.submit([8, 9, 10], long, NeverExit())
    while request.id not in finished:
        engine.step(finished)
    assert engine.kv.capacity > 128
    assert float(shortfalls(model, finished[request.id]).max()) <= CLOSE
    assert not torch.isnan(engine.kv.keys_LSGCH).any()
