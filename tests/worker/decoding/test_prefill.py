"""Prompts in chunks: the same tokens, and nobody waits for long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.schedule import Schedule
from offramp.worker.engine.engine_config import MIB, EngineConfig
from offramp.worker.model.kv import BLOCK_TOKENS, EXACT
from support.models import LAYERS, VOCAB, make_model
from support.rows import CLOSE, counted_tokens, drain, shortfalls

LONG_PROMPT = [(7 * n * n + 3 * n + 5) % VOCAB for n in range(50)]
SAMPLING = SamplingParams(max_tokens=60, ignore_eos=True)


def engine_of(model: Any, slots: int = 4, **config: Any) -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(model, slots=slots, config=EngineConfig(**config))


@pytest.mark.parametrize("prefill_tokens", [1, 7, 49])
def test_a_prompt_in_chunks_is_the_prompt_at_once(family: str, prefill_tokens: int) -> None:
    """Keys and values within 1e-4 in float32, and the tokens of full depth."""
    model = make_model(family)
    entries = []
    for tokens in (256, prefill_tokens):
        engine = engine_of(model, prefill_tokens=tokens)
        request = engine.submit(LONG_PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
        while not engine.step():
            pass
        assert (engine.kv.provenance_SC[0, : len(LONG_PROMPT)] == EXACT).all()
        at = (slice(None), 0, slice(None), slice(len(LONG_PROMPT)))
        entries.append((engine.kv.keys_LSGCH[at].clone(), engine.kv.values_LSGCH[at].clone()))
        [row] = drain(engine, [request])
        assert float(shortfalls(model, row).max()) <= CLOSE
    for whole, chunked in zip(*entries, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=CLOSE)


def test_a_running_row_emits_in_every_step_while_a_long_prompt_is_read() -> None:
    engine = engine_of(make_model("llama"), prefill_tokens=6)
    running = engine.submit([5, 6], SAMPLING)
    engine.step()
    reading = [engine.submit(LONG_PROMPT, SAMPLING) for _ in range(2)]
    steps = 0
    with counted_tokens(engine) as counts:
        while engine.is_prefilling:
            counts.clear()
            events = engine.step()
            steps += 1
            assert [event.request_id for event in events][:1] == [running.id]
            # One token of the running row and, once it runs, one of the first that was read.
            decoding = 1 if steps <= 9 else 2
            assert all(counts[index] <= 6 + decoding for index in range(LAYERS))
    assert steps == 2 * -(-len(LONG_PROMPT) // 6)  # each is cut at its own multiples of 6
    assert {event.request_id for event in events} >= {reading[1].id}


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(holds=(2,), rows=2, patience=3)])
def test_no_step_reads_more_of_the_prompts_than_allowed(schedule: Schedule) -> None:
    engine = engine_of(make_model("llama"), prefill_tokens=5, schedule=schedule)
    for length in (3, 11, 1, 24, 9):
        engine.submit(LONG_PROMPT[:length], SamplingParams(max_tokens=1))
    read = []
    with counted_tokens(engine) as counts:
        while engine.load != (0, 0):
            counts.clear()
            engine.step()
            read.append(counts[0])
    assert max(read) == 5
    assert sum(read) == 3 + 11 + 1 + 24 + 9


def test_a_cancelled_prompt_frees_its_slot_within_one_step() -> None:
    engine = engine_of(make_model("llama"), slots=1, prefill_tokens=4)
    reading = engine.submit(LONG_PROMPT, SAMPLING)
    engine.step()
    waiting = engine.submit([5, 6], SAMPLING)
    assert engine.step() == []
    assert engine.load == (1, 1)
    engine.cancel(reading.id)
    assert [event.request_id for event in engine.step()] == [waiting.id]
    assert engine.load == (1, 0)


def test_a_half_read_prompt_moves_with_its_slot() -> None:
    model = make_model("llama")
    engine = engine_of(model, slots=2, prefill_tokens=4)
    first = engine.submit([5, 6], SAMPLING)
    moving = engine.submit(LONG_PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.cancel(first.id)
    [row] = drain(engine, [moving])
    assert float(shortfalls(model, row).max()) <= CLOSE


def block_mb(engine: AdaptiveEngine) -> float:
    return engine.kv.bytes_per_token * BLOCK_TOKENS / MIB


def test_a_memory_budget_refuses_what_it_cannot_hold() -> None:
    model = make_model("llama")
    one_block = block_mb(engine_of(model))
    engine = engine_of(model, kv_budget_mb=1.5 * one_block)
    with pytest.raises(RequestError, match=f"exceed the {BLOCK_TOKENS}") as refused:
        engine.submit([1, 2], SamplingParams(max_tokens=BLOCK_TOKENS - 1))
    assert refused.value.field == "max_tokens"
    assert engine.load == (0, 0)


def test_the_cache_never_grows_beyond_its_budget() -> None:
    model = make_model("llama")
    one_block = block_mb(engine_of(model, slots=2))
    for blocks in (1, 2):
        budget = blocks * one_block
        engine = engine_of(model, slots=2, kv_budget_mb=budget, prefill_tokens=64)
        room = SamplingParams(max_tokens=blocks * BLOCK_TOKENS - len(LONG_PROMPT), ignore_eos=True)
        rows = drain(engine, [engine.submit(LONG_PROMPT, room, NeverExit()) for _ in range(2)])
        assert [len(row.emitted) for row in rows] == [room.max_tokens] * 2
        grown = engine.kv.keys_LSGCH.nbytes + engine.kv.values_LSGCH.nbytes
        assert grown <= budget * MIB


def test_without_a_budget_a_request_may_fill_the_context() -> None:
    engine = engine_of(make_model("llama"))
    assert engine.row_tokens == engine.stack.context


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kv_mode": "forget"}, "kv_mode"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
        ({"max_pending": 0}, "max_pending"),
        ({"kv_budget_mb": 0.0}, "kv_budget_mb"),
        ({"kv_budget_mb": -3.0}, "kv_budget_mb"),
        ({"schedule": Schedule(holds=(LAYERS,))}, "holds"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        engine_of(make_model("llama"), **options)
    assert refused.value.field == field


def test_an_unknown_cache_mode_and_forced_drafts_are_refused() -> None:
    engine = engine_of(make_model("llama"))
    mode: Any = "forget"
    with pytest.raises(RequestError, match="kv_mode"):
        engine.submit([1, 2], kv_mode=mode)
    with pytest.raises(RequestError, match="forced tokens are no drafts"):
        engine.submit([1, 2], kv_mode="verify", forced=[3, 4])
