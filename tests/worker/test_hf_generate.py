"""``model.generate`` through the engine is ``model.generate``, and what it cannot be it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from offramp.controller.errors import RequestError
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import (
    AdaptiveEngine,
    EngineConfig,
    KVMode,
    SamplingParams,
    Schedule,
    early_exit,
)
from support.models import LAYERS, REFERENCE, make_model

PROMPTS = [[5, 17, 33, 2, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [60, 3, 60]]
MODES: tuple[KVMode, ...] = ("project", "defer", "verify")
PROCESSED: dict[str, dict[str, Any]] = {
    "none": {},
    "repetition": {"repetition_penalty": 1.7},
    "min-new-tokens": {"min_new_tokens": 12},
    "min-length": {"min_length": 14},
    "bad-words": {"bad_words_ids": [[3], [17, 4], [60, 61]]},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bias": {"sequence_bias": {(5,): 4.0, (7, 8): -3.0}},
    "encoder": {"encoder_repetition_penalty": 1.5},
    "forced-eos": {"forced_eos_token_id": 9},
    "two-ends": {"eos_token_id": [96, 12, 40], "pad_token_id": 1},
    "prefix": {"prefix_allowed_tokens_fn": lambda batch, _: list(range(3 + batch, 80, 1 + batch))},
}


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(p)) + p for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


class Llama:
    """A small model and its engine."""

    def __init__(self, family: str = "llama", **settings: Any) -> None:
        self.model = make_model(family)
        self.engine = AdaptiveEngine(self.model, slots=3, config=EngineConfig(**settings))

    def both(self, *route: Any, prompts: Any = PROMPTS, **asked: Any) -> tuple[Any, Any]:
        """What Hugging Face decodes, and what the engine does."""
        asked = {"max_new_tokens": 20, "do_sample": False, **padded(prompts), **asked}
        torch.manual_seed(3)
        plain = self.model.generate(**asked)
        torch.manual_seed(3)
        return plain, self.model.generate(**asked, custom_generate=early_exit(self.engine, *route))


@pytest.fixture
def llama() -> Llama:
    return Llama()


@pytest.mark.parametrize("asked", PROCESSED.values(), ids=PROCESSED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3"])
def test_exits_off_equals_generate(name: str, asked: dict[str, Any]) -> None:
    plain, ours = Llama(name).both(**asked)
    assert ours.tolist() == plain.tolist()


def test_every_family_with_several_processors(family: str) -> None:
    plain, ours = Llama(family).both(repetition_penalty=1.3, no_repeat_ngram_size=3)
    assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize("asked", PROCESSED.values(), ids=PROCESSED)
@pytest.mark.parametrize("holds", [(), (2,)])
def test_verified_exits_equal_generate(asked: dict[str, Any], holds: tuple[int, ...]) -> None:
    llama = Llama(schedule=Schedule(holds=holds))
    plain, ours = llama.both(FixedExit(3), "verify", **asked)
    assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize("kv_mode", MODES)
def test_exits_decode_as_the_engine_does(llama: Llama, kv_mode: KVMode) -> None:
    _, ours = llama.both(FixedExit(2), kv_mode)
    own = llama.engine.generate(
        PROMPTS, SamplingParams(max_tokens=20), FixedExit(2), kv_mode=kv_mode
    )
    columns = max(map(len, PROMPTS))
    for row, completion in zip(ours[:, columns:].tolist(), own, strict=True):
        assert row[: len(completion.token_ids)] == completion.token_ids


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 9, "temperature": 1.3},
    "top-p": {"top_p": 0.8, "top_k": 0},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.6},
    "all": {"top_k": 20, "top_p": 0.9, "temperature": 2.0, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("asked", SAMPLED.values(), ids=SAMPLED)
def test_seeded_draws_are_generates_own(llama: Llama, asked: dict[str, Any]) -> None:
    # Rows that end would draw no longer, while generate draws for them to the end.
    plain, ours = llama.both(
        prompts=PROMPTS[:3], do_sample=True, eos_token_id=None, pad_token_id=None, **asked
    )
    assert ours.tolist() == plain.tolist()


@pytest.mark.parametrize("asked", SAMPLED.values(), ids=SAMPLED)
def test_verified_draws_of_one_row_are_generates_own(llama: Llama, asked: dict[str, Any]) -> None:
    plain, ours = llama.both(
        FixedExit(3), "verify", prompts=PROMPTS[:1], do_sample=True, eos_token_id=None, **asked
    )
    assert ours.tolist() == plain.tolist()


class Ends(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends row b after a number of tokens that depends on b."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("ends", [{}, {"eos_token_id": None}], ids=["padded", "not padded"])
@pytest.mark.parametrize("kv_mode", MODES)
def test_stopping_criteria_end_rows_one_by_one(
    llama: Llama, ends: dict[str, Any], kv_mode: KVMode
) -> None:
    policy = FixedExit(2) if kv_mode == "verify" else None
    plain, ours = llama.both(policy, kv_mode, stopping_criteria=[Ends([13, 10, 18, 11])], **ends)
    assert plain.shape[1] == 18
    assert ours.tolist() == plain.tolist()


def test_stop_strings_end_rows(reference: AdaptiveEngine) -> None:
    model, tokenizer = reference.model, AdaptiveEngine.from_pretrained(REFERENCE).tokenizer
    prompt = tokenizer("import os\n\ndef ", return_tensors="pt")
    asked = {
        **prompt,
        "max_new_tokens": 40,
        "stopping_criteria": [StopStringCriteria(tokenizer, ["-> s", "Return"])],
    }
    plain = model.generate(**asked, do_sample=False)
    ours = model.generate(**asked, do_sample=False, custom_generate=early_exit(reference))
    assert plain.shape[1] < prompt["input_ids"].shape[1] + 40
    assert ours.tolist() == plain.tolist()


class Kept(BaseStreamer):  # type: ignore[misc]  # transformers is untyped
    """Keeps what a streamer gets."""

    def __init__(self) -> None:
        self.columns: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.columns.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("kv_mode", MODES)
@pytest.mark.parametrize("ends", [{}, {"eos_token_id": None}], ids=["padded", "not padded"])
def test_streamers_get_generates_columns(
    llama: Llama, kv_mode: KVMode, ends: dict[str, Any]
) -> None:
    plain, ours = Kept(), Kept()
    asked = {**padded(PROMPTS), "max_new_tokens": 20, "do_sample": False, **ends}
    criteria = [Ends([13, 10, 18, 11])]
    llama.model.generate(**asked, stopping_criteria=criteria, streamer=plain)
    policy = FixedExit(2) if kv_mode == "verify" else None
    route = early_exit(llama.engine, policy, kv_mode)
    llama.model.generate(**asked, stopping_criteria=criteria, streamer=ours, custom_generate=route)
    assert ours.columns == plain.columns
    assert ours.ended == 1


@pytest.mark.parametrize("kv_mode", MODES)
def test_a_dict_holds_scores_logits_and_depths(llama: Llama, kv_mode: KVMode) -> None:
    policy = FixedExit(2) if kv_mode == "verify" else None
    plain, ours = llama.both(
        policy,
        kv_mode,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.5,
    )
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert len(ours.scores) == len(ours.logits) == len(plain.scores) == ours.exit_layers.shape[1]
    live = ours.exit_layers != 0
    for name in ("scores", "logits"):
        for step, (mine, theirs) in enumerate(
            zip(getattr(ours, name), getattr(plain, name), strict=True)
        ):
            rows = live[:, step]
            torch.testing.assert_close(mine[rows], theirs[rows], atol=1e-4, rtol=1e-4)
    if kv_mode == "verify":
        assert 2 in ours.exit_layers.unique().tolist()
    else:
        assert ours.exit_layers[live].unique().tolist() == [LAYERS]


def test_a_dict_without_scores(llama: Llama) -> None:
    plain, ours = llama.both(FixedExit(LAYERS), return_dict_in_generate=True)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.scores is None
    assert ours.logits is None


class Custom(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Forbids odd tokens in odd rows, in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[1::2, 1::2] = -torch.inf
        return scores


def test_a_processor_may_tell_rows_apart(llama: Llama) -> None:
    plain, ours = llama.both(logits_processor=[Custom()])
    assert ours.tolist() == plain.tolist()


def test_rows_beyond_the_slots_and_other_requests(llama: Llama) -> None:
    alone = [event.token for event in llama.engine.stream([9, 8, 7])]
    other = llama.engine.stream([9, 8, 7])
    tokens = [next(other).token for _ in range(3)]
    plain, ours = llama.both(prompts=PROMPTS * 3)
    assert ours.tolist() == plain.tolist()
    assert tokens + [event.token for event in other] == alone
    assert llama.engine.load == (0, 0)


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "guidance_scale": {"guidance_scale": 1.5},
    "cache_implementation": {"cache_implementation": "static"},
    "past_key_values": {"past_key_values": DynamicCache()},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 5, 48)},
    "position_ids": {"position_ids": torch.arange(5)[None] + 1},
    "attention_mask": {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])},
    "max_tokens": {"max_new_tokens": 400},
}


@pytest.mark.parametrize(("field", "asked"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(
    llama: Llama, field: str, asked: dict[str, Any]
) -> None:
    asked = {"input_ids": torch.tensor([PROMPTS[0]]), "max_new_tokens": 4, **asked}
    with pytest.raises(RequestError) as caught:
        llama.model.generate(**asked, custom_generate=early_exit(llama.engine))
    assert caught.value.field == field
    assert llama.engine.load == (0, 0)


def test_an_assistant_is_refused(llama: Llama) -> None:
    with pytest.raises(RequestError, match="assistant_model"):
        llama.model.generate(
            torch.tensor([[5]]),
            max_new_tokens=4,
            assistant_model=make_model("llama"),
            custom_generate=early_exit(llama.engine),
        )


def test_stateful_processors_are_refused(llama: Llama) -> None:
    from transformers import SynthIDTextWatermarkingConfig

    marks = SynthIDTextWatermarkingConfig(ngram_len=2, keys=[1, 2])
    with pytest.raises(RequestError, match="SynthID"):
        llama.both(do_sample=True, watermarking_config=marks)


def test_another_model_is_refused(llama: Llama) -> None:
    with pytest.raises(RequestError, match="another model"):
        make_model("llama").generate(
            torch.tensor([[5]]), max_new_tokens=4, custom_generate=early_exit(llama.engine)
        )


def test_a_criterion_that_raises_leaves_the_engine_clean(llama: Llama) -> None:
    class Broken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            raise KeyError("broken")

    with pytest.raises(KeyError):
        llama.model.generate(
            **padded(PROMPTS),
            max_new_tokens=4,
            stopping_criteria=[Broken()],
            custom_generate=early_exit(llama.engine),
        )
    assert llama.engine.load == (0, 0)
    plain, ours = llama.both()
    assert ours.tolist() == plain.tolist()


def test_a_processor_that_raises_harms_no_other_request(llama: Llama) -> None:
    alone = [event.token for event in llama.engine.stream([9, 8, 7])]
    other = llama.engine.stream([9, 8, 7], policy=FixedExit(2), kv_mode="verify")
    tokens = [next(other).token]

    def allowed(_: int, sent: torch.Tensor) -> list[int]:
        return [] if len(sent) > 12 else [3, 4]

    with pytest.raises(ValueError, match="empty list"):
        llama.model.generate(
            **padded(PROMPTS),
            max_new_tokens=20,
            prefix_allowed_tokens_fn=allowed,
            custom_generate=early_exit(llama.engine, FixedExit(2), "verify"),
        )
    assert tokens + [event.token for event in other] == alone
