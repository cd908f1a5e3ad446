"""What sampling options do to whole completions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.controller.errors import RequestError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine, Completion, PolicySnapshot, SamplingParams
from support.models import VOCAB, make_model

PROMPT = [5, 17, 33]
TEXT = "import os\n\ndef "


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def engine(model: Any) -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(model)


def generate(engine: AdaptiveEngine, prompt: Any = PROMPT, **options: Any) -> list[Completion]:
    return engine.generate([prompt], SamplingParams(**{"max_tokens": 12} | options))


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def hf_logprobs(model: Any, tokens: list[int], first: int, layers: int | None = None) -> Tensor:
    """Log-softmax of Hugging Face's logits, or of a layer's state under the final norm and head.

    Shape [tokens from ``first`` on, V].
    """
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), output_hidden_states=True)
        if layers is None:
            logits_TV = out.logits[0]
        else:
            logits_TV = model.lm_head(model.model.norm(out.hidden_states[layers][0]))
    logprobs_TV: Tensor = logits_TV[first - 1 : -1].float().log_softmax(-1)
    return logprobs_TV


def test_several_completions_come_in_order_with_seeds_of_their_own(engine: AdaptiveEngine) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "ignore_eos": True}
    sampling = SamplingParams(max_tokens=12, n=3, seed=20, **hot)
    several = engine.generate([PROMPT, [7]], sampling)
    assert [each.index for each in several] == [0, 1, 2, 0, 1, 2]
    alone = [
        generate(engine, prompt, seed=seed, **hot)[0].token_ids
        for prompt in (PROMPT, [7])
        for seed in (20, 21, 22)
    ]
    assert tokens_of(several) == alone
    assert len({tuple(tokens) for tokens in alone}) == 6
    unseeded = generate(engine, n=3, **hot)
    assert len({tuple(each.token_ids) for each in unseeded}) == 3


def test_several_greedy_completions_are_the_same(engine: AdaptiveEngine) -> None:
    [alone] = generate(engine)
    assert tokens_of(generate(engine, n=2)) == [alone.token_ids] * 2


def test_one_stream_is_one_completion(engine: AdaptiveEngine) -> None:
    for call in (engine.submit, lambda *given: list(engine.stream(*given))):
        with pytest.raises(RequestError) as refused:
            call(PROMPT, SamplingParams(n=2))
        assert refused.value.field == "n"
    assert engine.load == (0, 0)


def test_the_completions_of_one_call_share_a_policy(model: Any) -> None:
    numbers = iter(range(1, 100))
    engine = AdaptiveEngine.from_pretrained(
        model, current_policy=lambda: PolicySnapshot(next(numbers), "a", NeverExit())
    )
    assert {each.stats.generation for each in generate(engine, n=3)} == {1}


def test_min_tokens_holds_off_the_end(engine: AdaptiveEngine) -> None:
    [plain] = generate(engine)
    ends = plain.token_ids[2]
    [stopped] = generate(engine, stop_token_ids=(ends,))
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(ends) + 1]
    assert stopped.finish_reason == "stop"
    engine.stack.eos_tokens = frozenset([ends])
    [longer] = generate(engine, min_tokens=6)
    assert ends not in longer.token_ids[:6]
    assert len(longer.token_ids) >= 6
    [held] = generate(engine, min_tokens=12, max_tokens=12, stop_token_ids=(1, 2, 3))
    assert not {ends, 1, 2, 3} & set(held.token_ids)
    assert held.finish_reason == "length"


def test_a_bias_forces_and_forbids_a_token(engine: AdaptiveEngine) -> None:
    assert generate(engine, logit_bias={42: 100.0})[0].token_ids == [42] * 12
    first = generate(engine)[0].token_ids[0]
    assert generate(engine, logit_bias={first: -100.0})[0].token_ids[0] != first


def test_a_repetition_penalty_is_that_of_hugging_faces_generate(
    engine: AdaptiveEngine, model: Any
) -> None:
    out = model.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=20, repetition_penalty=1.3
    )
    expected = out[0, len(PROMPT) :].tolist()
    [ours] = generate(engine, max_tokens=20, repetition_penalty=1.3)
    assert ours.token_ids == expected
    assert ours.token_ids != generate(engine, max_tokens=20)[0].token_ids


def test_top_k_of_one_is_greedy_at_any_temperature(engine: AdaptiveEngine) -> None:
    greedy = tokens_of(generate(engine))
    assert tokens_of(generate(engine, temperature=5.0, top_k=1)) == greedy
    assert tokens_of(generate(engine, temperature=1.0, min_p=1.0)) == greedy


def test_logprobs_are_those_of_hugging_faces_logits(reference: AdaptiveEngine) -> None:
    prompt = reference.tokenizer.encode(TEXT)
    for options in ({}, {"temperature": 1.5, "top_k": 20, "seed": 3}):
        [completion] = generate(reference, prompt, logprobs=3, **options)
        tokens = completion.token_ids
        expected_TV = hf_logprobs(reference.stack.model, prompt + tokens, len(prompt))
        chosen_T = expected_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(chosen_T.tolist(), abs=1e-3)
        assert completion.top_logprobs is not None
        best = expected_TV.topk(3)
        for top, values in zip(completion.top_logprobs, best.values.tolist(), strict=True):
            assert [value for _, value in top] == pytest.approx(values, abs=1e-3)
    assert generate(reference, prompt)[0].logprobs is None


def test_a_tokens_logprob_comes_from_the_layer_it_left_at(
    engine: AdaptiveEngine, model: Any
) -> None:
    sampling = SamplingParams(max_tokens=2, logprobs=1)
    [early] = engine.generate([PROMPT], sampling, FixedExit(2))
    assert early.exit_layers[1] == 2
    assert early.logprobs is not None
    tokens = PROMPT + early.token_ids
    at_exit_V = hf_logprobs(model, tokens, len(PROMPT) + 1, layers=2)[0]
    full_V = hf_logprobs(model, tokens, len(PROMPT) + 1)[0]
    assert early.logprobs[1] == pytest.approx(float(at_exit_V[tokens[-1]]), abs=1e-4)
    assert early.logprobs[1] != pytest.approx(float(full_V[tokens[-1]]), abs=1e-2)


def test_a_stop_string_may_span_tokens(reference: AdaptiveEngine) -> None:
    [plain] = generate(reference, TEXT, max_tokens=40)
    pieces = [reference.tokenizer.decode([token]) for token in plain.token_ids]
    where = next(i for i in range(5, 30) if len(pieces[i]) > 1 and len(pieces[i + 1]) > 1)
    stop = pieces[where][-1] + pieces[where + 1][0]
    [cut] = generate(reference, TEXT, max_tokens=40, stop=("never there", stop))
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert plain.text.startswith(cut.text + stop)
    assert cut.token_ids == plain.token_ids[: len(cut.token_ids)]
    assert stop in reference.tokenizer.decode(cut.token_ids)
    assert stop not in reference.tokenizer.decode(cut.token_ids[:-1])
    assert reference.load == (0, 0)


def test_text_that_could_begin_a_stop_string_is_held_back_and_then_shown(
    reference: AdaptiveEngine,
) -> None:
    [plain] = generate(reference, TEXT, max_tokens=20)
    stop = plain.text[-6:] + "§"  # begins at the very end, and is never completed
    sampling = SamplingParams(max_tokens=20, stop=(stop,))
    events = list(reference.stream(TEXT, sampling))
    assert "".join(event.text for event in events) == plain.text
    assert events[-1].finish_reason == "length"
    assert len(events[-1].text) >= 6
    for event, start in zip(events, plain.token_ids, strict=True):
        assert event.token == start


def test_offsets_say_where_each_tokens_text_begins(reference: AdaptiveEngine) -> None:
    stop = generate(reference, TEXT, max_tokens=20)[0].text[8:12]
    for stops in ((), (stop,)):
        sampling = SamplingParams(max_tokens=20, stop=stops)
        events = list(reference.stream(TEXT, sampling))
        whole = reference.tokenizer.decode([event.token for event in events])
        for event, after in zip(events, [*events[1:], None], strict=True):
            end = after.text_offset if after else len(whole)
            text = reference.tokenizer.decode([event.token])
            assert whole[event.text_offset : end] == text


def test_no_stop_string_counts_before_min_tokens(reference: AdaptiveEngine) -> None:
    [plain] = generate(reference, TEXT, max_tokens=20)
    early = reference.tokenizer.decode(plain.token_ids[:3])
    assert generate(reference, TEXT, max_tokens=20, stop=(early,))[0].text == ""
    [muted] = generate(reference, TEXT, max_tokens=20, stop=(early,), min_tokens=3)
    assert muted.token_ids == plain.token_ids


def test_a_stop_token_is_not_in_the_text(reference: AdaptiveEngine) -> None:
    [plain] = generate(reference, TEXT)
    ends = plain.token_ids[6]
    first = plain.token_ids.index(ends)
    [stopped] = generate(reference, TEXT, stop_token_ids=(ends,), ignore_eos=True)
    assert stopped.token_ids == plain.token_ids[: first + 1]
    assert stopped.text == reference.tokenizer.decode(plain.token_ids[:first])
    assert stopped.finish_reason == "stop"


def test_a_bad_prompt_is_refused_before_it_is_echoed(reference: AdaptiveEngine) -> None:
    with pytest.raises(RequestError) as refused:
        reference.generate([[-1]], echo=True)
    assert refused.value.field == "prompt"


def test_an_echo_is_the_prompts_text(reference: AdaptiveEngine) -> None:
    sampling = SamplingParams(max_tokens=5, n=2)
    tokens = reference.tokenizer.encode(TEXT)
    plain = reference.generate([TEXT], sampling)[0].text
    for prompt in (TEXT, tokens):
        echoed = reference.generate([prompt], sampling, echo=True)
        assert [each.text for each in echoed] == [TEXT + plain] * 2


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop": ("a",)}, "stop"),  # the engine has no tokenizer
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1}, "stop_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_by_name(
    engine: AdaptiveEngine, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        generate(engine, **options)
    assert refused.value.field == field
    with pytest.raises(RequestError) as refused:
        engine.generate([PROMPT], echo=True)
    assert refused.value.field == "echo"
    assert engine.load == (0, 0)
