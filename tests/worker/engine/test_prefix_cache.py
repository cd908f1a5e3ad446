"""The prefix cache: prompts that begin alike are read once, and no completion changes by a bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.decoding.request import KVMode, PolicySnapshot, TokenEvent
from offramp.worker.engine.engine_config import MIB
from offramp.worker.engine.prefixes import PrefixCache, beginnings, next_cut
from offramp.worker.model.kv import Entries
from support.models import DEVICE, VOCAB, make_model, save_adapters
from support.rows import drain

CHUNK = 8
SYSTEM = [(7 * n * n + 3 * n + 5) % VOCAB for n in range(21)]
PROMPTS = [[*SYSTEM, *range(first, first + more)] for first, more in ((1, 6), (2, 19), (1, 14))]
KNOWN = [0, 16, 24]
"""Of these prompts, read in this order: two chunks of SYSTEM, then the first prompt's third."""
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)


def engine_of(model: Any, mib: float = 4.0, slots: int = 3, **config: Any) -> AdaptiveEngine:
    options = EngineConfig(prefill_tokens=CHUNK, prefix_cache_mib=mib, **config)
    return AdaptiveEngine(model, slots=slots, config=options)


def known(events: list[TokenEvent]) -> int | None:
    stats = events[-1].stats
    assert stats is not None
    return stats.cached_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["project", "defer", "verify"])
def test_every_event_is_the_same_with_and_without(dtype: torch.dtype, mode: KVMode) -> None:
    model = make_model("llama", dtype).to(DEVICE)
    with_cache, without = engine_of(model), engine_of(model, mib=0)
    found = []
    for prompt, sampling in itertools.product(
        PROMPTS, (SAMPLING, SamplingParams(max_tokens=12, temperature=0.8, seed=3))
    ):
        asked = (prompt, sampling, FixedExit(2))
        theirs = list(without.stream(*asked, kv_mode=mode))
        ours = list(with_cache.stream(*asked, kv_mode=mode))
        assert ours == theirs  # stats too, but for what was known
        assert known(theirs) is None
        found.append(known(ours))
    assert found[::2] == KNOWN
    assert found[1::2] == [24, 32, 32]  # the same prompt again


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_entries_in_the_slots_are_the_same_bits_whoever_else_reads_or_is_cancelled(
    family: str,
) -> None:
    model = make_model(family).to(DEVICE)
    engine = engine_of(model)
    # Two rows run, whose last chunks are read beside others; one is cancelled half read.
    running = [engine.submit(prompt, SAMPLING) for prompt in PROMPTS[:2]]
    for _ in range(3):
        engine.step()
    engine.cancel(engine.submit([*SYSTEM[::-1], *SYSTEM], SAMPLING).id)
    third = engine.submit(PROMPTS[2], SAMPLING)
    rows = {row.request.id: row for row in engine._roster.rows}
    while third.id not in rows or not rows[third.id].is_prefilled:
        engine.step()
        rows = {row.request.id: row for row in engine._roster.rows}
    assert rows[third.id].recalled == KNOWN[2]
    for request in (*running, third):
        alone, length = engine_of(model, mib=0, slots=1), len(request.prompt)
        alone.submit(request.prompt, SAMPLING)
        while not alone.step():
            pass
        for ours, theirs in (
            (engine.kv.keys_LSGCH, alone.kv.keys_LSGCH),
            (engine.kv.values_LSGCH, alone.kv.values_LSGCH),
        ):
            slot = rows[request.id].slot
            assert torch.equal(ours[:, slot, :, :length], theirs[:, 0, :, :length])
    tokens = [row.emitted for row in drain(engine, [*running, third])]
    alone = engine_of(model, mib=0, slots=1)
    assert tokens == [each.token_ids for each in alone.generate(PROMPTS, SAMPLING)]


def test_prompts_read_for_their_logprobs_or_under_another_salt_recall_nothing() -> None:
    engine = engine_of(make_model("llama"))
    engine.generate(PROMPTS[0], SAMPLING)
    told = SamplingParams(max_tokens=2, prompt_logprobs=1)
    events = list(engine.stream(PROMPTS[0], told))
    assert known(events) is None
    assert len(events[0].prompt_draws) == len(PROMPTS[0]) - 1
    for salt, recalled in (("a", 0), ("b", 0), ("a", 24), ("", 24)):
        [row] = drain(engine, [engine.submit(PROMPTS[0], SAMPLING, cache_salt=salt)])
        assert row.recalled == recalled


def test_a_prompt_of_whole_chunks_still_reads_the_last() -> None:
    engine = engine_of(make_model("llama"))
    for recalled in (0, 8):
        [row] = drain(engine, [engine.submit(SYSTEM[: 2 * CHUNK], SAMPLING)])
        assert row.recalled == recalled


def test_adapter_layers_recall_only_what_they_have_read_themselves(tmp_path: Path) -> None:
    model = make_model("llama")
    engines = [engine_of(model, mib, kv_mode="defer") for mib in (4.0, 0.0)]
    old, new = (save_adapters("llama", tmp_path / str(n), (1, 3), seed=n) for n in (3, 4))

    def run(policy: Policy, folder: Path | None) -> int | None:
        ours, theirs = (
            list(
                engine.stream(
                    PROMPTS[0],
                    SAMPLING,
                    PolicySnapshot(
                        1, "", policy, adapters=engine.take_in(folder) if folder else None
                    ),
                )
            )
            for engine in engines
        )
        assert ours == theirs
        return known(ours)

    # Any policy without adapter layers shares with any other, each adapter only with itself.
    assert [run(NeverExit(), None), run(FixedExit(3), None), run(NeverExit(), old)] == [0, 24, 24]
    # Once no snapshot names the old ones, the new ones take their places in the stack.
    assert [run(FixedExit(3), old), run(FixedExit(3), new), run(FixedExit(1), new)] == [0, 0, 0]
    assert [run(FixedExit(3), old), run(FixedExit(3), new)] == [24, 24]


def test_it_keeps_to_its_bound_and_lets_go_the_least_recently_used() -> None:
    kept = PrefixCache(most_bytes=3 * 2 * 16)
    made: list[bytes] = []

    def keep(*names: bytes) -> list[bytes]:
        def make() -> Entries:
            made.append(names[-1])
            return Entries(torch.zeros(4), torch.zeros(4))

        kept.keep(names, make)
        return [name for name in (b"1", b"12", b"123", b"4", b"5") if kept.find(name)]

    keep(b"1")
    keep(b"1", b"12")
    assert keep(b"1", b"12", b"123") == [b"1", b"12", b"123"]
    assert keep(b"4") == [b"1", b"12", b"4"]  # the longest goes first
    assert keep(b"1") == [b"1", b"12", b"4"]
    assert keep(b"5") == [b"1", b"4", b"5"]
    assert made == [b"1", b"12", b"123", b"4", b"5"]
    assert kept.nbytes == 96


def test_an_engine_keeps_to_the_bound_and_lets_go_the_longest_beginnings_first() -> None:
    model = make_model("llama")
    chunk_mib = engine_of(model).kv.bytes_per_token / 3 * CHUNK / MIB
    engine = engine_of(model, mib=2.5 * chunk_mib)
    prompt = [*SYSTEM, *SYSTEM]
    found = [drain(engine, [engine.submit(prompt, SAMPLING)])[0].recalled for _ in range(2)]
    assert found == [0, 2 * CHUNK]
    prefixes = engine._prompts.prefixes
    assert prefixes is not None
    assert prefixes.nbytes <= 2.5 * chunk_mib * MIB
    with pytest.raises(ConfigError, match="prefix_cache_mib") as refused:
        engine_of(model, mib=0.5 * chunk_mib)
    assert "8 tokens" in str(refused.value)
    with pytest.raises(ConfigError, match="0 to keep nothing"):
        EngineConfig(prefix_cache_mib=float("nan"))


def test_short_prompts_share_beginnings_of_32_64_and_128_tokens_bit_for_bit() -> None:
    model = make_model("llama").to(DEVICE)
    config = EngineConfig(prefix_cache_mib=4)
    engine = AdaptiveEngine(model, slots=1, config=config)
    text = [(5 * n * n + n) % VOCAB for n in range(200)]
    engine.generate(text, SAMPLING)
    found = []
    for shared in (31, 40, 70, 150):
        prompt = [*text[:shared], *range(1, 40)]
        fresh = AdaptiveEngine(model, slots=1, config=config)
        ours, theirs = (list(each.stream(prompt, SAMPLING)) for each in (engine, fresh))
        assert [event._replace(request_id="r0") for event in ours] == theirs
        found.append(known(ours))
    assert found == [0, 32, 64, 128]


@pytest.mark.parametrize(
    ("chunk", "ends"),
    [(256, [32, 64, 128, 256, 512]), (48, [32, 48, 96, 144, 192]), (8, [8, 16, 24, 32, 40])],
)
def test_chunks_double_up_to_the_longest(chunk: int, ends: list[int]) -> None:
    names = list(beginnings("", range(ends[-1]), chunk))
    assert [end for end, _ in names] == ends
    assert [next_cut(end, chunk) for end in (0, *ends[:-1])] == ends


def test_names_tell_root_chunk_and_tokens_apart() -> None:
    names = [
        list(beginnings(root, tokens, chunk))
        for root, tokens, chunk in (
            ("", [1, 2, 3, 4], 2),
            ("", [1, 2, 3, 5], 2),
            ("", [1, 2, 3, 4], 4),
            ("1", [1, 2, 3, 4], 2),
        )
    ]
    assert [[end for end, _ in each] for each in names] == [[2, 4], [2, 4], [4], [2, 4]]
    assert names[0][0] == names[1][0]
    assert len({name for each in names for _, name in each}) == 6
