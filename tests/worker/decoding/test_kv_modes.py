"""Deferred keys and values are full depth's own; verified tokens are full depth's tokens.

Full depth's opinion comes from Hugging Face in one pass over prompt and emitted tokens.
Shape suffixes: L layers, G key/value heads, T tokens, H head_dim.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.kv import EXACT, PENDING, PROJECTED
from support.models import FAMILIES, LAYERS, VOCAB, make_model
from support.rows import (
    CLOSE,
    RAGGED,
    RandomExit,
    counted_tokens,
    decode,
    drain,
    ends_right,
    full_logits,
    shortfalls,
    step_until_first_token,
)

ALONE = RAGGED[:1]
COHORTS = [
    Schedule(holds=(2,), rows=2, patience=2),
    Schedule(holds=(1, 3), rows=3, patience=4),
    Schedule(holds=(1,), rows=4, patience=9),
    Schedule(holds=(1, 2, 3, 4), rows=2, patience=1),
]
TOGETHER = Schedule(together=True, rows=3, patience=4)
SCHEDULES = [LOCKSTEP, *COHORTS, TOGETHER]
BF16_CLOSE = 2**-5
"""Of the largest logit; Hugging Face's own `generate` is up to 0.024 from one pass over all."""


def engine_of(model: Any, **config: Any) -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(model, slots=4, config=EngineConfig(**config))


@torch.inference_mode()
def full_entries(model: Any, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a full pass, [L, G, T, H]."""
    ids = torch.tensor([tokens], device=model.device)
    cache = model(ids, use_cache=True).past_key_values
    keys, values = zip(*((layer.keys[0], layer.values[0]) for layer in cache.layers), strict=True)
    return torch.stack(keys), torch.stack(values)


def assert_closed_entries_are_exact(
    engine: AdaptiveEngine, model: Any, row: Sequence, close: float
) -> int:
    """Compare a running row's cache with a full pass; how many of its tokens are open."""
    count = len(row.emitted)
    fed = [*row.request.prompt, *(row.request.forced[:count] or row.emitted)]
    if not row.undecided:
        fed.pop()  # emitted, but not fed yet
    keys, values = full_entries(model, fed)
    depths = dict.fromkeys(range(len(fed)), LAYERS)
    depths.update({token.position: token.depth for token in row.open})
    for position, depth in depths.items():
        at = (slice(depth), row.slot, slice(None), position)
        theirs = (slice(depth), slice(None), position)
        torch.testing.assert_close(engine.kv.keys_LSGCH[at], keys[theirs], rtol=0, atol=close)
        torch.testing.assert_close(engine.kv.values_LSGCH[at], values[theirs], rtol=0, atol=close)
        expected = EXACT if depth == LAYERS else PENDING
        assert engine.kv.provenance_SC[row.slot, position] == expected
    return len(row.open)


@pytest.mark.parametrize(
    ("schedule", "prompts"),
    [(LOCKSTEP, ALONE), (COHORTS[1], RAGGED)],
    ids=["alone", "ragged in cohorts"],
)
def test_deferred_entries_are_those_of_a_full_pass(
    family: str, schedule: Schedule, prompts: list[list[int]]
) -> None:
    """The same entries as a full pass over the emitted tokens, within 1e-4 in float32."""
    model = make_model(family)
    engine = engine_of(model, kv_mode="defer", schedule=schedule, max_pending=4)
    sampling = SamplingParams(max_tokens=60, ignore_eos=True)
    for seed, prompt in enumerate(prompts):
        engine.submit(prompt, sampling, RandomExit(0.5, seed))
    opened = set()
    for step in range(36):
        engine.step()
        if step % 5 == 0:
            for row in engine._roster.rows:
                opened.add(assert_closed_entries_are_exact(engine, model, row, CLOSE))
    assert 0 in opened
    assert max(opened) > 0
    assert engine.load == (len(prompts), 0)


def test_deferred_entries_of_forced_tokens_are_those_of_a_full_pass(family: str) -> None:
    model = make_model(family)
    engine = engine_of(model, kv_mode="defer", schedule=COHORTS[0], max_pending=4)
    for seed, prompt in enumerate(RAGGED):
        forced = [(11 * n + seed) % VOCAB for n in range(40)]
        engine.submit(prompt, policy=RandomExit(0.5, seed), forced=forced)
    for _ in range(30):
        engine.step()
    for row in engine._roster.rows:
        assert_closed_entries_are_exact(engine, model, row, CLOSE)


def test_projected_entries_are_marked_as_such(family: str) -> None:
    engine = engine_of(make_model(family), kv_mode="project")
    engine.submit(RAGGED[0], SamplingParams(max_tokens=30, ignore_eos=True), RandomExit(0.4))
    for _ in range(20):
        engine.step()
    [row] = engine._roster.rows
    prompt = len(RAGGED[0])
    depths = row.exit_layers[1:]
    expected = [EXACT] * prompt + [EXACT if e == LAYERS else PROJECTED for e in depths]
    assert engine.kv.provenance_SC[0, : prompt + len(depths)].tolist() == expected
    assert {EXACT, PROJECTED} == set(expected[prompt:])


@pytest.mark.parametrize("max_pending", [1, 3, 8])
@pytest.mark.parametrize("kv_mode", ["defer", "verify"])
def test_so_many_tokens_are_put_off_and_no_more(kv_mode: KVMode, max_pending: int) -> None:
    engine = engine_of(make_model("llama"), kv_mode=kv_mode, max_pending=max_pending)
    engine.submit([5, 6], SamplingParams(max_tokens=60, ignore_eos=True), FixedExit(4))
    opened = []
    for _ in range(40):
        engine.step()
        opened.append(len(engine._roster.rows[0].open))
    assert max(opened) == max_pending
    assert 0 in opened


LONG = SamplingParams(max_tokens=34, ignore_eos=True)
SHORT = SamplingParams(max_tokens=9)


def end_tokens(model: Any) -> frozenset[int]:
    """A token with which the second prompt comes to its end."""
    return frozenset([decode(engine_of(model), RAGGED[1:2], SHORT, NeverExit())[0].emitted[5]])


def verified(
    model: Any, schedule: Schedule, seed: int, max_pending: int, ends: frozenset[int]
) -> list[Sequence]:
    """Eight rows: six of them long, two with end tokens."""
    engine = AdaptiveEngine.from_pretrained(
        model,
        slots=8,
        config=EngineConfig(kv_mode="verify", schedule=schedule, max_pending=max_pending),
    )
    engine.stack.eos_tokens = ends
    policies = [RandomExit(chance, seed) for chance in (0.35, 0.7)]
    requests = [
        engine.submit(prompt, SHORT if index == 1 else LONG, policy)
        for policy in policies
        for index, prompt in enumerate(RAGGED)
    ]
    return drain(engine, requests)


def test_verified_tokens_are_full_depths(family: str) -> None:
    """Every token is the best at full depth: no float32 logit is higher by more than 1e-4."""
    model = make_model(family)
    ends = end_tokens(model)
    rows = []
    runs = list(enumerate(zip(SCHEDULES, (1, 3, 8, 8, 3, 5), strict=True)))
    if family != "llama":  # schedules know nothing of families: the others have three of the six
        runs = runs[list(FAMILIES).index(family) % 2 :: 2]
    for seed, (schedule, most) in runs:
        rows += verified(model, schedule, seed, most, ends)
    for row in rows:
        assert float(shortfalls(model, row).max()) <= CLOSE
        assert ends_right(row, frozenset() if row.request.sampling.ignore_eos else ends)
    assert sum(len(row.emitted) for row in rows) >= 166 * len(runs)
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    # Some drafts were confirmed, and some taken back.
    assert 0 < sum(row.drafts_accepted for row in rows) < sum(row.drafts_made for row in rows)


def test_verified_tokens_alone_are_full_depths(family: str) -> None:
    model = make_model(family)
    for max_pending, schedule in zip((3, 8, 5), (COHORTS[0], LOCKSTEP, TOGETHER), strict=True):
        engine = engine_of(model, schedule=schedule, max_pending=max_pending)
        sampling = SamplingParams(max_tokens=40, ignore_eos=True)
        [row] = decode(engine, ALONE, sampling, RandomExit(0.5), "verify")
        assert float(shortfalls(model, row).max()) <= CLOSE


def test_verified_tokens_in_bfloat16_are_full_depths_but_for_ties(family: str) -> None:
    """Another token than the best only where bfloat16 can hardly tell the two apart."""
    model = make_model(family, torch.bfloat16)
    rows = [
        row
        for schedule in (COHORTS[1], TOGETHER)
        for row in decode(
            engine_of(model, schedule=schedule), RAGGED, LONG, RandomExit(0.5, 1), "verify"
        )
    ]
    missed = []
    for row in rows:
        short = shortfalls(model, row)
        assert float(short.max()) <= BF16_CLOSE * float(full_logits(model, row).abs().max())
        missed += (short > 0).tolist()
    assert sum(missed) < 0.06 * len(missed)


def test_accepting_every_draft_is_not_full_depth(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the comparison the tokens are wrong."""
    monkeypatch.setattr(
        "offramp.worker.decoding.emit.accepted_greedily", lambda drafts, full_tokens: len(drafts)
    )
    model = make_model(family)
    rows = decode(engine_of(model), RAGGED, LONG, RandomExit(0.5), "verify")
    assert max(float(shortfalls(model, row).max()) for row in rows) > 0.1


def test_without_the_fill_projected_tokens_change(family: str) -> None:
    """Negative control: a row that exits, then goes deep, needs the entries it skipped."""
    model = make_model(family)
    tokens = []
    for fills in (True, False):
        engine = engine_of(model)
        engine.decoder = Decoder(engine.stack, engine.kv, fills=fills)
        rows = decode(engine, RAGGED, SamplingParams(max_tokens=24), RandomExit(0.4), "project")
        tokens.append([row.emitted for row in rows])
    assert tokens[0] != tokens[1]


MODES: tuple[KVMode, ...] = ("project", "defer", "verify")
EACH_WITH_EACH = list(product((LOCKSTEP, COHORTS[1], TOGETHER), MODES))


@pytest.mark.parametrize(
    ("family", "schedule", "kv_mode"),
    # How calls are counted is no matter of the family: one of them sees each pair, the others
    # every schedule and every mode once.
    [("llama", *pair) for pair in EACH_WITH_EACH]
    + [(each, *pair) for each in FAMILIES if each != "llama" for pair in EACH_WITH_EACH[::4]],
)
def test_layer_calls_are_what_hooks_count(family: str, schedule: Schedule, kv_mode: KVMode) -> None:
    engine = engine_of(make_model(family), schedule=schedule, max_pending=3)
    request = engine.submit(
        RAGGED[0], SamplingParams(max_tokens=30), RandomExit(0.5), kv_mode=kv_mode
    )
    finished: dict[str, Any] = {}
    step_until_first_token(engine, finished)
    with counted_tokens(engine) as counts:
        while request.id not in finished:
            engine.step(finished)
    row = finished[request.id]
    assert sum(counts.values()) == row.layer_calls
    if kv_mode == "project":
        assert row.layer_calls == sum(row.exit_layers[1:])
        assert [counts[i] for i in range(LAYERS)] == [
            sum(depth > i for depth in row.exit_layers[1:]) for i in range(LAYERS)
        ]


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
@pytest.mark.parametrize("schedule", [Schedule(holds=(2,), rows=3, patience=6), TOGETHER])
def test_policies_that_read_features_decide_in_company_as_alone(
    kv_mode: KVMode, schedule: Schedule
) -> None:
    """Rows change slots while they wait; each must still be judged by its own state."""
    model = make_model("llama")
    policy = ThresholdPolicy((1, 3, 4), SOFTMAX_V2, "margin", 0.2)
    lengths = [3, 25, 5, 21, 8, 17, 4, 12]
    engine = engine_of(model, schedule=schedule, kv_mode=kv_mode)
    together = drain(
        engine,
        [
            engine.submit(prompt, SamplingParams(max_tokens=n, ignore_eos=True), policy)
            for prompt, n in zip(RAGGED * 2, lengths, strict=True)
        ],
    )
    for row in together:
        [alone] = decode(
            engine_of(model), [list(row.request.prompt)], row.request.sampling, policy, kv_mode
        )
        assert row.emitted == alone.emitted
        if kv_mode == "project":  # put-off tokens force depth where others ride along
            assert row.exit_layers == alone.exit_layers
