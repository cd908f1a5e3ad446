"""Drafts on a copy of the layers in fewer bytes: the tokens are full depth's, whatever the copy is.

In float32, where ties can be told from faults, a copy with noisy weights stands in for a quantised
one; in bfloat16 it is quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts.confident import ConfidentDraft
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.drafts.thompson import ThompsonDraft
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.protocols import (
    FixedExit,
    IndexArray,
    NeverExit,
    Policy,
    ThresholdPolicy,
)
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.decoding.draft_wave import DraftWave
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.families import stack_for
from offramp.worker.model.precision import Precision
from offramp.worker.model.prepared import prepare
from support.cost_tables import measured
from support.models import FAMILIES, LAYERS, make_model
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
DEPTHS = tuple(Exit(layer, "int8") for layer in range(1, LAYERS + 1))
LAST = DEPTHS[-1]
MIXED = (*DEPTHS, *range(1, LAYERS))
HOLDS = Schedule(holds=(2,), rows=2, patience=2)
TOGETHER = Schedule(together=True, rows=3, patience=3)
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
    engine.config = replace(engine.config, draft_precision=Precision(weights="int8"))
    stack = prepare(stack_for(noisy(model, noise)))
    pending = engine.config.max_pending
    engine.decoder = Decoder(engine.stack, engine.kv, max_pending=pending, copy=stack)
    return engine


@dataclass
class RandomRoute:
    """Asks first anywhere, and leaves, goes on or gives up at random."""

    seed: int
    exits: tuple[int, ...]
    schema: None = None
    candidates_VK: None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        return self.rng.integers(0, len(self.exits) + 1, size=len(outlook_NC))

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        targets_N = self.rng.integers(here, len(self.exits) + 1, size=len(features_NF))
        return np.where(self.rng.random(len(features_NF)) < 0.4, here, targets_N)


def policies() -> list[Policy]:
    return [
        RandomExit(0.4, 0, DEPTHS),
        RandomExit(0.8, 1, DEPTHS),
        FixedExit(LAST),
        StaticDraft(layer=LAST, length=3),
        StaticDraft(layer=DEPTHS[1], length=2),
        ConfidentDraft(layer=LAST, threshold=0.3),
        ThresholdPolicy((DEPTHS[1], LAST), SOFTMAX_V2, "margin", 0.2),
        NeverExit(),
    ]


def mixed_policies() -> list[Policy]:
    """Policies with exits of both kinds, and some with those of one, side by side."""
    return [
        RandomRoute(0, MIXED),
        RandomRoute(1, (*DEPTHS[1:3], LAST, 1, 3)),
        RandomRoute(2, (LAST, 2)),
        RandomRoute(3, (LAST, 1, 4)),
        RandomExit(0.15, 0, MIXED),
        ThresholdPolicy((LAST, 2, 4), SOFTMAX_V2, "margin", 0.5),
        RandomExit(0.5, 1, (1, 3)),
        StaticDraft(layer=LAST, length=3),
    ]


def _on(weights: Any, policy: Policy) -> Policy:
    """The same policy with its exits on a copy in other weights."""
    exits = tuple(Exit(layer, weights) for layer in policy.exits)
    if isinstance(policy, StaticDraft | ConfidentDraft | FixedExit):
        return replace(policy, layer=exits[0])
    return policy if isinstance(policy, NeverExit) else replace(cast(Any, policy), exits=exits)


def _counting(most: int, policy: Policy) -> Policy:
    """The same policy for an engine that lets so many drafts pend."""
    if isinstance(policy, ConfidentDraft | StaticDraft):
        return replace(policy, max_pending=most, length=min(policy.length, most))
    return policy


def submitted(
    engine: AdaptiveEngine, tried: Iterable[Policy], kv_mode: KVMode = "verify"
) -> list[Sequence]:
    return drain(
        engine,
        [
            engine.submit(prompt, LONG, policy, kv_mode=kv_mode)
            for prompt, policy in zip(RAGGED * 2, tried, strict=True)
        ],
    )


SETTINGS = [
    (policies, HOLDS, 3),
    (mixed_policies, TOGETHER, 4),
    (policies, LOCKSTEP, 8),
    (policies, LOCKSTEP, 1),
    (mixed_policies, LOCKSTEP, 8),
]


@pytest.mark.parametrize(
    ("family", "tried", "schedule", "pending"),
    # The plain schedule is one family's alone: what it does, the others do, too.
    [("llama", *each) for each in SETTINGS]
    + [(family, *each) for family in FAMILIES if family != "llama" for each in SETTINGS[:2]],
)
def test_tokens_are_full_depths(
    family: str, tried: Callable[[], list[Policy]], schedule: Schedule, pending: int
) -> None:
    model = make_model(family)
    fitting = [_counting(pending, policy) for policy in tried()]
    rows = submitted(engine_with_copy(model, schedule=schedule, max_pending=pending), fitting)
    for row in rows:
        assert float(shortfalls(model, row).max()) <= CLOSE
    assert 0 < sum(row.drafts_accepted for row in rows) < sum(row.drafts_made for row in rows)


@pytest.mark.parametrize(("share", "pays"), [(0.05, True), (2.5, False)])
def test_a_priced_schedule_knows_what_the_copy_costs(share: float, pays: bool) -> None:
    model = make_model("llama")
    engine = engine_with_copy(model)
    costs = measured(engine.model_fingerprint)
    copy_ = tuple(each.scaled("layer", share) for each in costs.copies["int4"])
    engine.set_schedule(Schedule(costs=replace(costs, copies={"int8": copy_})))
    [row] = decode(engine, RAGGED[:1], LONG, StaticDraft(layer=LAST, length=3), "verify")
    assert float(shortfalls(model, row).max()) <= CLOSE
    assert (row.copy_calls > 0) is pays
    with pytest.raises(ConfigError, match="--draft-weights int8"):
        engine.set_schedule(Schedule(costs=costs))


def test_one_token_may_be_asked_on_the_copy_and_then_in_the_models_layers() -> None:
    model = make_model("llama")
    for exits in (DEPTHS[1], LAST), (LAST, 2), (LAST, 2, 4):
        rows = submitted(engine_with_copy(model), [RandomRoute(n, exits) for n in range(8)])
        left = {exit_ for row in rows for exit_ in row.exit_layers}
        assert set(exits) <= left  # tokens were accepted from each of them
        for row in rows:
            assert float(shortfalls(model, row).max()) <= CLOSE
            assert row.copy_calls > 0


def test_verifying_from_the_copys_states_would_change_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: a deep pass that trusted what the copy computed is found out."""
    leave = DraftWave._leave

    def trusted(self: DraftWave, row: Sequence, executed: int, state_1D: Any, known: Any) -> None:
        leave(self, row, executed, state_1D, known)
        row.open[-1].depth, row.open[-1].state_D = int(executed), state_1D[0]

    monkeypatch.setattr(DraftWave, "_leave", trusted)
    model = make_model("llama")
    shallow = [RandomRoute(n, (DEPTHS[1],)) for n in range(8)]
    rows = submitted(engine_with_copy(model, 3.0), shallow)
    assert max(float(shortfalls(model, row).max()) for row in rows) > CLOSE


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_a_perfect_and_a_useless_copy(noise: float) -> None:
    model = make_model("llama")
    engine = engine_with_copy(model, noise)
    [row] = decode(engine, RAGGED[:1], LONG, StaticDraft(layer=LAST, length=4), "verify")
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


@pytest.mark.parametrize(
    ("family", "weights"),
    # gpt2 keeps its matrices the other way round.
    [(family, "int4") for family in FAMILIES] + [("llama", "int8"), ("gpt2", "int8")],
)
def test_drafts_of_quantised_layers_leave_full_depths_tokens(family: str, weights: Any) -> None:
    model = make_model(family, torch.bfloat16, **WIDE)
    config = EngineConfig(kv_mode="verify", draft_precision=Precision(weights=weights))
    drafting = [_on(weights, policy) for policy in policies()]
    rows = submitted(AdaptiveEngine(model, slots=8, config=config), drafting)
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
    policy = StaticDraft(layer=LAST, length=3)
    runs = [
        decode(engine_with_copy(model), RAGGED[:1], sampling, policy, "verify")[0] for _ in range(2)
    ]
    assert runs[0].emitted == runs[1].emitted
    assert runs[0].drafts_accepted > 0


@pytest.mark.parametrize("kv_mode", ["project", "defer"])
def test_the_models_own_exits_never_see_the_copy(kv_mode: KVMode) -> None:
    model = make_model("llama")
    own = [RandomExit(0.1 * n, n) for n in range(8)]
    with_copy = submitted(engine_with_copy(model, 3.0), own, kv_mode)
    plain = AdaptiveEngine(model, slots=8, config=EngineConfig(kv_mode=kv_mode))
    again = [RandomExit(0.1 * n, n) for n in range(8)]
    assert [r.emitted for r in with_copy] == [r.emitted for r in submitted(plain, again, kv_mode)]
    assert all(row.copy_calls == 0 for row in with_copy)


@pytest.mark.parametrize("kv_mode", ["project", "defer"])
def test_modes_that_emit_early_tokens_refuse_exits_on_the_copy(kv_mode: KVMode) -> None:
    engine = engine_with_copy(make_model("llama"))
    with pytest.raises(RequestError, match="Use verify") as refusal:
        engine.submit([1, 2], LONG, StaticDraft(layer=LAST, length=2), kv_mode=kv_mode)
    assert refusal.value.field == "kv_mode"


@pytest.mark.parametrize("drafts", [None, Precision(weights="int4")])
def test_an_engine_without_the_copy_refuses_the_policy(drafts: Precision | None) -> None:
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(kv_mode="verify"))
    engine.config = replace(engine.config, draft_precision=drafts)
    policy = StaticDraft(layer=LAST, length=2)
    for ask in (engine.prepare, lambda policy: engine.submit([1, 2], LONG, policy)):
        with pytest.raises(RequestError, match="--draft-weights int8") as refusal:
            ask(policy)
        assert refusal.value.field == "exits"


def test_a_policy_that_learns_is_told_of_drafts_on_the_copy() -> None:
    engine = engine_with_copy(make_model("llama"))
    policy = ThompsonDraft(LAST)
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


def test_a_policy_that_counts_other_drafts_than_may_pend_is_refused_by_name() -> None:
    engine = AdaptiveEngine(make_model("llama"), slots=1, config=EngineConfig(max_pending=3))
    policy = StaticDraft(layer=1, length=2, max_pending=8)
    for refused in (
        lambda: engine.submit((1, 2), policy=policy, kv_mode="verify"),
        lambda: engine.prepare(policy),
    ):
        with pytest.raises(RequestError, match="--max-pending 8") as refusal:
            refused()
        assert refusal.value.field == "max_pending"
    engine.submit((1, 2), policy=StaticDraft(layer=1, length=2, max_pending=3), kv_mode="verify")
    engine.submit((1, 2), policy=policy, kv_mode="defer")  # nothing is drafted there
