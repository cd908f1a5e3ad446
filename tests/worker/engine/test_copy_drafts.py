"""Drafts on a copy of the layers in fewer bytes: the tokens are full depth's, whatever the copy is.

In float32, where ties can be told from faults, a copy with noisy weights stands in for a quantised
one; in bfloat16 it is quantised.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from offramp.controller.errors import ConfigError
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.drafts.confident import ConfidentDraft
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.drafts.thompson import ThompsonDraft
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.families import stack_for
from offramp.worker.model.precision import Precision
from offramp.worker.model.prepared import prepare
from support.models import LAYERS, make_model
from support.rows import (
    CLOSE,
    RAGGED,
    RandomExit,
    counted_tokens,
    decode,
    drain,
    full_logits,
    shortfalls,
)

LONG = SamplingParams(max_tokens=30, ignore_eos=True)
WIDE = {"hidden_size": 64}
DEPTHS = tuple(range(1, LAYERS + 1))
HOLDS = Schedule(holds=(2,), rows=2, patience=2)
BF16_CLOSE = 2**-6
"""Of the largest logit; two to four steps of bfloat16."""


def noisy(model: Any, noise: float) -> Any:
    """A copy of a model whose layers' matrices are a little off."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    for parameter in twin.parameters():
        if parameter.dim() > 1 and parameter.shape[0] != model.config.vocab_size:
            error = torch.randn(parameter.shape, generator=generator) * noise
            parameter.data.mul_(1 + error.to(parameter.dtype))
    return twin


def engine_with_copy(model: Any, noise: float = 0.03, **settings: Any) -> AdaptiveEngine:
    engine = AdaptiveEngine(model, slots=8, config=EngineConfig(kv_mode="verify", **settings))
    stack = prepare(stack_for(noisy(model, noise)))
    pending = engine.config.max_pending
    engine.decoder = Decoder(engine.stack, engine.kv, max_pending=pending, copy=stack)
    return engine


def policies() -> list[Policy]:
    return [
        RandomExit(0.4, 0, DEPTHS),
        RandomExit(0.8, 1, DEPTHS),
        FixedExit(LAYERS),
        StaticDraft(layer=LAYERS, length=3),
        StaticDraft(layer=2, length=2),
        ConfidentDraft(layer=LAYERS, threshold=0.3),
        ThresholdPolicy((2, LAYERS), SOFTMAX_V2, "margin", 0.2),
        NeverExit(),
    ]


def submitted(engine: AdaptiveEngine, kv_mode: KVMode = "verify") -> list[Sequence]:
    prompts = RAGGED * 2
    return drain(
        engine,
        [
            engine.submit(prompt, LONG, policy, kv_mode=kv_mode)
            for prompt, policy in zip(prompts, policies(), strict=True)
        ],
    )


@pytest.mark.parametrize(("schedule", "pending"), [(LOCKSTEP, 8), (LOCKSTEP, 1), (HOLDS, 3)])
def test_tokens_are_full_depths(family: str, schedule: Schedule, pending: int) -> None:
    model = make_model(family)
    rows = submitted(engine_with_copy(model, schedule=schedule, max_pending=pending))
    for row in rows:
        assert float(shortfalls(model, row).max()) <= CLOSE
    assert 0 < sum(row.drafts_accepted for row in rows) < sum(row.drafts_made for row in rows)


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_perfect_and_a_useless_copy(noise: float) -> None:
    model = make_model("llama")
    engine = engine_with_copy(model, noise)
    [row] = decode(engine, RAGGED[:1], LONG, StaticDraft(layer=LAYERS, length=4), "verify")
    assert float(shortfalls(model, row).max()) <= CLOSE
    if noise == 0:
        assert row.drafts_accepted == row.drafts_made
        # After the prompt's token, four drafts and one of full depth for each pass over five.
        assert row.layer_calls < LAYERS * len(row.emitted) + 5 * LAYERS
        assert row.copy_calls == LAYERS * row.drafts_made
    else:
        assert row.drafts_accepted < row.drafts_made / 4


def test_verified_entries_are_written_anew() -> None:
    """Nothing of the copy's is left in the cache where full depth has passed."""
    model = make_model("llama")
    engine = engine_with_copy(model, 3.0)
    [row] = decode(engine, RAGGED[:1], LONG, RandomExit(0.7, 2, DEPTHS), "verify")
    tokens = [*row.request.prompt, *row.emitted[:-1]]
    with torch.inference_mode():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    engine.generate(tokens, SamplingParams(max_tokens=1), NeverExit())
    assert row.drafts_made > 10
    request = engine.submit(RAGGED[0], LONG, RandomExit(0.7, 2, DEPTHS), kv_mode="verify")
    finished: dict[str, Sequence] = {}
    for _ in range(12):
        engine.step(finished)
    assert request.id not in finished
    [running] = engine._roster.rows
    # The newest token, and those that are pending, have not passed.
    whole = len(running.request.prompt) + len(running.emitted) - 1
    for index, layer in enumerate(cache.layers):
        mine = engine.kv.keys_LSGCH[index, running.slot, :, :whole]
        torch.testing.assert_close(mine, layer.keys[0, :, :whole], rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_drafts_of_quantised_layers_leave_full_depths_tokens(family: str, weights: Any) -> None:
    model = make_model(family, torch.bfloat16, **WIDE)
    config = EngineConfig(kv_mode="verify", draft_precision=Precision(weights=weights))
    rows = submitted(AdaptiveEngine(model, slots=8, config=config))
    missed = []
    for row in rows:
        short = shortfalls(model, row)
        assert float(short.max()) <= BF16_CLOSE * float(full_logits(model, row).abs().max())
        missed += (short > 0).tolist()
    assert sum(missed) < 0.06 * len(missed)
    deep, shallow = rows[3], rows[4]  # static drafts after all layers of the copy, and after two
    assert (
        deep.drafts_accepted / deep.drafts_made
        > 1.5 * shallow.drafts_accepted / shallow.drafts_made
    )


def test_sampled_drafts_keep_to_the_seed_and_end() -> None:
    model = make_model("llama")
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=3, ignore_eos=True)
    policy = StaticDraft(layer=LAYERS, length=3)
    runs = [
        decode(engine_with_copy(model), RAGGED[:1], sampling, policy, "verify")[0] for _ in range(2)
    ]
    assert runs[0].emitted == runs[1].emitted
    assert runs[0].drafts_accepted > 0


@pytest.mark.parametrize("kv_mode", ["project", "defer"])
def test_other_modes_never_see_the_copy(kv_mode: KVMode) -> None:
    model = make_model("llama")
    with_copy = submitted(engine_with_copy(model, 3.0), kv_mode)
    plain = AdaptiveEngine(model, slots=8, config=EngineConfig(kv_mode=kv_mode))
    assert [row.emitted for row in with_copy] == [row.emitted for row in submitted(plain, kv_mode)]
    assert all(row.copy_calls == 0 for row in with_copy)


def test_a_policy_that_learns_is_told_of_drafts_on_the_copy() -> None:
    engine = engine_with_copy(make_model("llama"))
    policy = ThompsonDraft(LAYERS)
    [row] = decode(engine, RAGGED[:1], LONG, policy, "verify")
    # Each verdict on a draft that was right adds to alpha, which begins at 1.
    assert policy.alpha == 1 + row.drafts_accepted
    assert row.drafts_accepted > 0


def test_calls_on_the_copy_are_what_hooks_count() -> None:
    engine = engine_with_copy(make_model("llama"), max_pending=3)
    assert engine.decoder.context.copy is not None
    on_copy: list[int] = []
    for block in engine.decoder.context.copy.stack.blocks:
        block.register_forward_hook(lambda _, args, out: on_copy.append(out.shape[0]))
    request = engine.submit(RAGGED[0], LONG, RandomExit(0.6, 0, DEPTHS))
    finished: dict[str, Sequence] = {}
    engine.step(finished)
    with counted_tokens(engine) as counts:
        while request.id not in finished:
            engine.step(finished)
    row = finished[request.id]
    assert sum(on_copy) == row.copy_calls > 0
    assert sum(counts.values()) == row.layer_calls


def test_a_failing_policy_costs_its_request_the_drafts_only() -> None:
    class Raises(RandomExit):
        def leave(self, features_NF: Any) -> Any:
            raise ValueError("broken")

    model = make_model("llama")
    engine = engine_with_copy(model)
    rows = decode(engine, RAGGED[:2], LONG, Raises(0.5, 0, DEPTHS), "verify")
    for row in rows:
        assert float(shortfalls(model, row).max()) <= CLOSE
        assert row.policy_failed
    assert engine.decoder.failures == 2


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"draft_precision": Precision()}, "int4"),
        (
            {"precision": Precision(weights="int4"), "draft_precision": Precision(weights="int4")},
            "leave it out",
        ),
    ],
)
def test_a_copy_that_cannot_gain_is_refused(settings: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as refusal:
        EngineConfig(**settings)
    assert refusal.value.field == "draft_weights"
