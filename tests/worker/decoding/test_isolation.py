"""What is wrong with one request stays with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from offramp.controller.errors import ConfigError, DecodeFailedError, ModelError, RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, KVMode, PolicySnapshot, SamplingParams
from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.engine import roster
from support.models import VOCAB, make_model
from support.rows import drain

POISON = 50
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def poisonous() -> Any:
    """A model that gives NaN from one token on."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    return model


def drained(engine: AdaptiveEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.load != (0, 0):
        for event in engine.step():
            tokens.setdefault(event.request_id, []).append(event.token)
    return tokens


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_no_other_request(
    poisonous: Any, temperature: float, kv_mode: KVMode
) -> None:
    engine = AdaptiveEngine(poisonous)
    alone = engine.generate([[1, 2, 3]], LONG)[0].token_ids
    good = engine.submit([1, 2, 3], LONG)
    asked = SamplingParams(max_tokens=6, temperature=temperature, top_p=0.9, ignore_eos=True)
    bad = engine.submit([1, POISON, 3], asked, FixedExit(2), kv_mode=kv_mode)
    tokens = drained(engine)
    assert tokens[good.id] == alone
    assert len(tokens[bad.id]) == 6


def test_a_slot_is_clean_after_a_request_of_nan(poisonous: Any) -> None:
    engine = AdaptiveEngine(poisonous, slots=2)
    alone = engine.generate([[3, 4]], SamplingParams(max_tokens=12, ignore_eos=True))[0].token_ids
    engine.submit([1] * 4, LONG)
    bad = engine.submit([2] * 30 + [POISON], SamplingParams(max_tokens=4, ignore_eos=True))
    while not any(e.request_id == bad.id and e.finish_reason for e in engine.step()):
        pass
    # In the slot of NaN, beside a longer row: its mask covers what the last row left there.
    after = engine.submit([3, 4], SamplingParams(max_tokens=12, ignore_eos=True))
    assert drained(engine)[after.id] == alone


class Exits:
    """A policy with the given exits."""

    candidates_VK = None

    def __init__(self, exits: tuple[Any, ...], schema: FeatureSchema | None = None) -> None:
        self.exits = exits
        self.schema = schema

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return np.zeros(len(features_NF), np.bool_)


UNKNOWN = FeatureSchema("unknown", 1, ("one",))
UNFIT: dict[str, tuple[Any, str]] = {
    "text": ("never", "policy"),
    "letters": (Exits(("a",)), "exits"),
    "halves": (Exits((2.5,)), "exits"),
    "beyond": (Exits((9,)), "exits"),
    "descending": (Exits((3, 2)), "exits"),
    "published beyond": (PolicySnapshot(1, "", FixedExit(9)), "exits"),
    "published nothing": (PolicySnapshot(1, "", None), "policy"),  # type: ignore[arg-type]
    "unknown schema": (Exits((2,), UNKNOWN), "schema"),
    "published unknown schema": (PolicySnapshot(1, "", Exits((2,), UNKNOWN)), "schema"),
}


@pytest.mark.parametrize(("policy", "field"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_policy_is_refused_before_it_runs(policy: Any, field: str) -> None:
    engine = AdaptiveEngine(make_model("llama"))
    good = engine.submit([1, 2])
    engine.step()
    with pytest.raises(RequestError) as caught:
        engine.submit([1], None, policy)
    assert caught.value.field == field
    assert engine.load == (1, 0)
    assert drained(engine)[good.id]


def test_what_is_no_sampling_and_no_prompt_is_refused() -> None:
    engine = AdaptiveEngine(make_model("llama"))
    with pytest.raises(RequestError, match="sampling"):
        engine.submit([1], {"max_tokens": 2})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="prompts"):
        engine.generate(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"prefill_tokens": 1.5}, {"max_pending": "x"}, {"kv_budget_mb": float("nan")}]
)
def test_settings_that_are_no_numbers_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EngineConfig(**settings)


class Explodes(Sampler):
    """Raises at the given token of its request."""

    def __init__(self, at: int) -> None:
        super().__init__(SamplingParams(logprobs=0), (), frozenset(), VOCAB)
        self.at = at

    def draw(self, logits_V: torch.Tensor, emitted: Sequence[int]) -> Draw:
        if len(emitted) == self.at:
            raise IndexError("out of bounds")
        return super().draw(logits_V, emitted)

    def distribution(self, logits_V: torch.Tensor, emitted: Sequence[int]) -> torch.Tensor:
        if len(emitted) >= self.at:
            raise IndexError("out of bounds")
        return super().distribution(logits_V, emitted)


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
@pytest.mark.parametrize("at", [0, 5])
def test_a_row_that_cannot_be_drawn_fails_alone(at: int, kv_mode: KVMode) -> None:
    engine = AdaptiveEngine(make_model("llama"), slots=3)
    [alone] = engine.generate([[1, 2, 3]], LONG, FixedExit(2), kv_mode=kv_mode)
    before, bad, after = (
        engine.submit([1, 2, 3], LONG, FixedExit(2), kv_mode=kv_mode, sampler=sampler)
        for sampler in (None, Explodes(at), None)
    )
    tokens = drained(engine)
    assert tokens[before.id] == tokens[after.id] == alone.token_ids
    assert len(tokens.get(bad.id, [])) <= at
    assert isinstance(engine.failed[bad.id].__cause__, IndexError)
    engine.cancel(bad.id)
    assert not engine.failed


def test_who_waits_for_a_row_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AdaptiveEngine(make_model("llama"))
    bad = engine.submit([1, 2], LONG, sampler=Explodes(3))
    with pytest.raises(DecodeFailedError):
        list(engine.follow([bad]))
    bad = engine.submit([1, 2], LONG, sampler=Explodes(3))
    with pytest.raises(DecodeFailedError):
        drain(engine, [bad])
    monkeypatch.setattr(engine._outbox, "events", lambda *_: [][0])
    with pytest.raises(DecodeFailedError) as caught:
        engine.generate([[1, 2]], LONG)
    assert isinstance(caught.value.__cause__, IndexError)
    assert engine.load == (0, 0)


@pytest.mark.parametrize(
    ("eos", "found"), [([96, 97], {96}), (-1, set()), (None, set()), ([300, -1], set())]
)
def test_end_tokens_outside_the_vocabulary_are_none(eos: Any, found: set[int]) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = eos
    if eos is None:
        model.config.eos_token_id = None
    engine = AdaptiveEngine(model)
    assert engine.stack.eos_tokens == found
    wanted = SamplingParams(max_tokens=3, min_tokens=3, logit_bias={VOCAB - 2: 100})
    assert engine.generate([[1, 2]], wanted)[0].token_ids == [VOCAB - 2] * 3


@pytest.mark.parametrize("eos", ["</s>", [96, None], [[96]], 96.0, True])
def test_end_tokens_that_are_no_ids_are_refused_when_the_engine_is_made(eos: Any) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = eos
    with pytest.raises(ModelError, match=r"eos_token_id.*generation_config\.json"):
        AdaptiveEngine(model)


@pytest.mark.parametrize("eos", [[96, 300], [-1, 96], 10**12])
def test_an_end_token_outside_the_vocabulary_disturbs_nobody(eos: Any) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = eos
    engine = AdaptiveEngine(model)
    [alone] = engine.generate([[1, 2, 3]], LONG)
    bystander = engine.submit([1, 2, 3], LONG)
    held_off = engine.submit([4, 5], SamplingParams(max_tokens=8, min_tokens=8))
    tokens = drained(engine)
    assert tokens[bystander.id] == alone.token_ids
    assert len(tokens[held_off.id]) == 8


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
def test_a_token_that_the_tokenizer_does_not_know_fails_its_request_alone(kv_mode: KVMode) -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)  # pure Python: it raises where others leave out
    unknown = len(tokenizer) + 40
    engine = AdaptiveEngine(make_model("llama", vocab_size=unknown + 1), tokenizer)
    biased = SamplingParams(max_tokens=60, ignore_eos=True, logit_bias={100: 100})
    [alone] = engine.generate(["ab"], biased, kv_mode=kv_mode)
    bystander = engine.submit("ab", biased, kv_mode=kv_mode)
    told = SamplingParams(max_tokens=4, logit_bias={unknown: 100})
    bad = engine.submit("ab", told, kv_mode=kv_mode)
    tokens = drained(engine)
    assert tokens[bystander.id] == alone.token_ids
    assert bad.id not in tokens
    with pytest.raises(DecodeFailedError, match=f"token {unknown} .* logit_bias"):
        raise engine.failed.pop(bad.id)
    [read] = engine.generate([[unknown, 100]], biased)  # what is only read need not be known
    assert read.text == alone.text
    with pytest.raises(RequestError, match="echo"):
        engine.generate([[unknown, 100]], biased, echo=True)
    assert engine.load == (0, 0)


def test_a_request_that_cannot_be_seated_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(sampling: SamplingParams, *rest: Any) -> Sampler:
        if sampling.seed == 13:
            raise MemoryError("no room")
        return Sampler(sampling, *rest)

    monkeypatch.setattr(roster, "Sampler", no_memory)
    engine = AdaptiveEngine(make_model("llama"), slots=3)
    [alone] = engine.generate([[1, 2, 3]], LONG)
    before = engine.submit([1, 2, 3], LONG)
    bad = engine.submit([1, 2, 3], SamplingParams(seed=13))
    after = engine.submit([1, 2, 3], LONG)
    tokens = drained(engine)
    assert tokens[before.id] == tokens[after.id] == alone.token_ids
    assert isinstance(engine.failed.pop(bad.id).__cause__, MemoryError)
    with pytest.raises(DecodeFailedError):
        engine.generate([[1, 2]], SamplingParams(seed=13))
    assert engine.load == (0, 0)
