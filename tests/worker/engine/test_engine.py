"""The engine's public surface: what it accepts, refuses and returns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError, ModelError, RequestError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, BoolArray, FloatArray
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, EngineConfig, PolicySnapshot, SamplingParams
from offramp.worker.engine.follow import follow
from offramp.worker.model.kv import BLOCK_TOKENS
from offramp.worker.spec import warm_up
from support.models import LAYERS, VOCAB, make_model, save_adapters
from support.releases.certificates import certificate
from support.releases.readers import bundled
from support.tokenizers import word_tokenizer


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"))


def test_strings_come_back_as_text(reference: AdaptiveEngine) -> None:
    [completion] = reference.generate("def main(", SamplingParams(max_tokens=12))
    assert completion.text == reference.tokenizer.decode(completion.token_ids)
    assert completion.finish_reason == "length"
    assert completion.stats.mean_exit_layer == reference.stack.layers


def test_a_string_and_its_tokens_are_the_same_prompt(reference: AdaptiveEngine) -> None:
    tokens = reference.tokenizer.encode("import os")
    sampling = SamplingParams(max_tokens=8)
    by_text, by_tokens = reference.generate(["import os", tokens], sampling)
    assert by_text.token_ids == by_tokens.token_ids


def test_streaming_yields_the_tokens_of_generate(engine: AdaptiveEngine) -> None:
    sampling = SamplingParams(max_tokens=10)
    events = list(engine.stream([3, 4], sampling, FixedExit(2)))
    [whole] = engine.generate([3, 4], sampling, FixedExit(2))
    assert [event.token for event in events] == whole.token_ids
    assert [event.exit_layer for event in events] == whole.exit_layers
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)


def test_closing_a_stream_frees_its_slot(engine: AdaptiveEngine) -> None:
    stream = engine.stream([3, 4], SamplingParams(max_tokens=50))
    next(stream)
    assert engine.load == (1, 0)
    stream.close()
    assert engine.load == (0, 0)


def test_the_end_token_stops_a_request_unless_ignored(engine: AdaptiveEngine) -> None:
    prompt = [3, 4]
    [plain] = engine.generate(prompt, SamplingParams(max_tokens=20))
    engine.stack.eos_tokens = frozenset([plain.token_ids[4]])
    first = plain.token_ids.index(plain.token_ids[4])
    [stopped] = engine.generate(prompt, SamplingParams(max_tokens=20))
    [ignored] = engine.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    engine.stack.eos_tokens = frozenset()
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert ignored.token_ids == plain.token_ids


def test_the_cache_grows_without_changing_a_token() -> None:
    model = make_model("llama")
    engine = AdaptiveEngine.from_pretrained(model)
    long = SamplingParams(max_tokens=BLOCK_TOKENS + 40, ignore_eos=True)
    [grown] = engine.generate([5, 6], long)
    assert engine.kv.capacity == 2 * BLOCK_TOKENS
    roomy = AdaptiveEngine.from_pretrained(model)
    roomy.kv.reserve(250)
    assert roomy.generate([5, 6], long)[0].token_ids == grown.token_ids


def test_more_requests_than_slots_wait_in_line() -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("llama"), slots=2)
    prompts = [[n, n + 1] for n in range(1, 8)]
    together = engine.generate(prompts, SamplingParams(max_tokens=6))
    alone = [engine.generate(p, SamplingParams(max_tokens=6))[0] for p in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_warming_up_leaves_nothing_behind() -> None:
    cold, warm = (AdaptiveEngine.from_pretrained(make_model("llama"), slots=2) for _ in "ab")
    warm_up(warm)
    assert warm.load == (0, 0)
    sampling = SamplingParams(max_tokens=9, seed=3)
    first, second = (each.generate([[1, 2, 3]], sampling)[0] for each in (cold, warm))
    assert first.token_ids == second.token_ids


def test_the_policy_is_pinned_when_a_request_is_submitted() -> None:
    current = PolicySnapshot(1, "a", NeverExit())
    engine = AdaptiveEngine.from_pretrained(make_model("llama"), current_policy=lambda: current)
    stream = engine.stream([3, 4], SamplingParams(max_tokens=6))
    events = [next(stream)]
    current = PolicySnapshot(2, "b", FixedExit(1))
    events += list(stream)
    assert {event.generation for event in events} == {1}
    assert {event.exit_layer for event in events} == {LAYERS}
    after = list(engine.stream([3, 4], SamplingParams(max_tokens=6)))
    assert {event.generation for event in after} == {2}
    assert {event.exit_layer for event in after[1:]} == {1}


def test_following_a_document_feeds_its_own_tokens(engine: AdaptiveEngine) -> None:
    documents = [list(range(1, 30)), list(range(40, 60))]
    together, _ = follow(engine, documents, 5, FixedExit(3))
    for document, run in zip(documents, together, strict=True):
        assert run.expected == document[6:]
        assert run.exit_layers == [3] * len(run.emitted)
        [alone], _ = follow(engine, [document], 5, FixedExit(3))
        assert alone.emitted == run.emitted
    [full], seconds = follow(engine, documents[:1], 5, NeverExit())
    free = engine.generate(documents[0][:10], SamplingParams(max_tokens=1))[0].token_ids
    assert full.emitted[4] == free[0]
    assert seconds > 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([], SamplingParams(), "prompt"),
        ([VOCAB], SamplingParams(), "prompt"),
        ([-1], SamplingParams(), "prompt"),
        ("text without a tokenizer", SamplingParams(), "prompt"),
        ([1] * 200, SamplingParams(max_tokens=100), "max_tokens"),
    ],
)
def test_unusable_requests_are_refused_by_name(
    engine: AdaptiveEngine, prompt: str | list[int], sampling: SamplingParams, field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        engine.generate([prompt], sampling)
    assert refused.value.field == field
    assert engine.load == (0, 0)


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (FixedExit(LAYERS + 1), "exits"),
        (ThresholdPolicy((3, 2), SOFTMAX_V2, "margin", 0.5), "exits"),
        (ThresholdPolicy((2,), CANDIDATES_V1, "margin", 0.5), "candidates"),
        (
            ThresholdPolicy((2,), CANDIDATES_V1, "margin", 0.5, np.ones((3, 2), np.int32)),
            "candidates",
        ),
    ],
)
def test_a_policy_of_another_model_is_refused(
    engine: AdaptiveEngine, policy: ThresholdPolicy, field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        engine.generate([1, 2], policy=policy)
    assert refused.value.field == field


def test_a_bundle_is_checked_against_the_model_and_its_certificate_counts(
    engine: AdaptiveEngine,
) -> None:
    own: dict[str, Any] = {"model": engine.model_fingerprint}
    policy = FixedExit(2)
    sampling = SamplingParams(max_tokens=4)
    under = [
        engine.generate([3, 4], sampling, each)[0].exit_layers
        for each in (policy, bundled(policy, **own))
    ]
    assert under[0] == under[1]
    assert set(under[0][1:]) == {2}  # the first is drawn from the prompt, read in full
    bound = certificate(bundled(policy, **own).manifest.digest, dtype="float32", delta=0.05)
    certified = bundled(policy, certificate=replace(bound, translators=""), **own)
    for quality, layers in ((0.95, {2}), (0.96, {LAYERS})):
        [found] = engine.generate([3, 4], sampling, certified, kv_mode=quality)
        assert set(found.exit_layers[1:]) == layers
    again = bundled(policy, **own)
    pinned = [engine.submit([3, 4], sampling, again).snapshot.policy for _ in range(2)]
    assert pinned[0] is pinned[1], "unpacked anew for each request"
    while engine.load != (0, 0):
        engine.step()
    spoken = AdaptiveEngine(engine.model, word_tokenizer(VOCAB))
    with pytest.raises(RequestError, match="policy: was made for tokenizer bb"):
        spoken.generate("w3", sampling, bundled(policy, **own))
    refused: dict[str, dict[str, Any]] = {
        "was made for model aa": {},
        "learned on a classification": own | {"training": {"task": "classify"}},
        "adapters bbbbbbbbbbbb, and the engine has none": own | {"adapters": "b" * 64},
    }
    for said, facts in refused.items():
        with pytest.raises(RequestError, match=f"policy: .*{said}"):
            next(engine.stream([3, 4], sampling, bundled(policy, **facts)))
    assert engine.load == (0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("translators", 5),
        ("translators", ""),
        ("prompts", "folder"),
        ("prompts", FixedExit(1)),
        ("schedule", "lockstep"),
        ("precision", "int4"),
        ("draft_precision", 4),
    ],
)
def test_a_setting_of_another_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}: .* is no "):
        EngineConfig(**{field: value})


@pytest.mark.parametrize("layer", ["3", True, 2.0, None])
def test_an_exit_is_a_number_of_layers(layer: Any) -> None:
    with pytest.raises(RequestError, match=r"layer: .* is no number of layers"):
        FixedExit(layer)


def test_a_kind_of_policy_is_none(engine: AdaptiveEngine) -> None:
    with pytest.raises(RequestError, match="is no exit policy"):
        engine.generate([3, 4], policy=FixedExit)  # type: ignore[arg-type]


def test_folders_may_be_named_as_text(tmp_path: Path) -> None:
    folder = str(save_adapters("llama", tmp_path / "tuned", (1,)))
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(translators=folder))  # type: ignore[arg-type]
    bundle = bundled(
        FixedExit(1), model=engine.model_fingerprint, adapters=engine.decoder.translators.digest
    )
    bundle.save(str(tmp_path / "policy"))
    found = PolicyBundle.load(str(tmp_path / "policy"))
    [said] = engine.generate([3, 4], SamplingParams(max_tokens=3), found)
    assert said.exit_layers[1:] == [1, 1]


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(engine: AdaptiveEngine) -> None:
    with pytest.raises(RequestError):
        engine.generate([[1, 2], [VOCAB + 5]])
    assert engine.load == (0, 0)


def test_no_slots_and_strange_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="slots"):
        AdaptiveEngine.from_pretrained(make_model("llama"), slots=0)
    with pytest.raises(ModelError, match="not supported"):
        AdaptiveEngine.from_pretrained(object())


def test_streams_share_an_engine_without_losing_tokens(engine: AdaptiveEngine) -> None:
    sampling = SamplingParams(max_tokens=6)
    alone = [engine.generate(p, sampling)[0].token_ids for p in ([3, 4], [5, 6], [7])]
    first, second = engine.stream([3, 4], sampling), engine.stream([5, 6], sampling)
    together = list(zip(first, second, strict=True))
    assert [a.token for a, _ in together] == alone[0]
    assert [b.token for _, b in together] == alone[1]
    half_read = engine.stream([3, 4], sampling)
    tokens = [next(half_read).token]
    assert engine.generate([7], sampling)[0].token_ids == alone[2]
    assert tokens + [event.token for event in half_read] == alone[0]


def test_an_interrupted_generate_leaves_nothing_behind() -> None:
    class Interrupting(FixedExit):
        def leave(self, features_NF: FloatArray) -> BoolArray:
            raise KeyboardInterrupt

    engine = AdaptiveEngine.from_pretrained(make_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2], [3, 4]], policy=Interrupting(2))
    assert engine.load == (0, 0)
    assert len(engine.generate([1, 2], SamplingParams(max_tokens=5))[0].token_ids) == 5


def test_models_that_would_not_decode_exactly_are_refused() -> None:
    eager = make_model("llama")
    eager.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="eager attention"):
        AdaptiveEngine.from_pretrained(eager)
    with pytest.raises(ModelError, match="training mode"):
        AdaptiveEngine.from_pretrained(make_model("llama").train())


def test_a_long_request_takes_no_room_before_it_needs_it() -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("llama"))
    stream = engine.stream([5, 6], SamplingParams(max_tokens=BLOCK_TOKENS + 60, ignore_eos=True))
    next(stream)
    assert engine.kv.capacity == BLOCK_TOKENS
    list(stream)
    assert engine.kv.capacity == 2 * BLOCK_TOKENS
