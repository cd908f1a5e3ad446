"""Stop strings, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.worker import AdaptiveEngine, KVMode, SamplingParams
from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.engine.detokenize import StopStrings
from support.models import make_model
from support.tokenizers import byte_level_tokenizer

text = st.text("ab\n", max_size=14)
stops = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def shown_by(matcher: StopStrings, pieces: list[str], *, ends: bool) -> tuple[str, bool]:
    """All that is shown of the pieces, and whether a stop string was found."""
    shown = ""
    for index, piece in enumerate(pieces):
        more, stopped = matcher.push(piece, ends and index == len(pieces) - 1)
        shown += more
        if stopped:
            return shown, True
    return shown, False


def up_to_first(whole: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the text before the stop string that is complete first."""
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


@settings(deadline=None, max_examples=500)
@given(pieces=st.lists(text, min_size=1, max_size=8), stops=stops)
def test_what_is_shown_is_the_text_up_to_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    assert shown_by(StopStrings(stops), pieces, ends=True) == up_to_first("".join(pieces), stops)


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(text, min_size=1, max_size=8), stops=stops)
def test_only_what_could_begin_a_stop_string_is_held_back(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    shown, stopped = shown_by(StopStrings(stops), pieces, ends=False)
    if stopped:
        assert (shown, True) == up_to_first(whole, stops)
        return
    held = whole.removeprefix(shown)
    assert shown + held == whole
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    # Nothing longer could still become a stop string.
    for start in range(len(shown)):
        assert not any(stop.startswith(whole[start:]) for stop in stops)


@settings(deadline=None, max_examples=300)
@given(early=text, pieces=st.lists(text, min_size=1, max_size=6), stops=stops)
def test_while_muted_nothing_stops_but_a_stop_string_may_begin(
    early: str, pieces: list[str], stops: list[str]
) -> None:
    whole = early + "".join(pieces)
    expected = whole, False
    for end in range(len(early) + 1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            expected = whole[: end - max(map(len, complete))], True
            break
    matcher = StopStrings(stops)
    first, stopped = matcher.push(early, muted=True)
    assert not stopped
    rest, stopped = shown_by(matcher, pieces, ends=True)
    assert (first + rest, stopped) == expected


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopStrings(())
    assert [matcher.push(piece) for piece in ("a", "", "b")] == [
        ("a", False),
        ("", False),
        ("b", False),
    ]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["</s>"], ["one <", "/", "s", "> two"], ["one ", "", "", ""]),
        (["</s>"], ["one <", "/b>"], ["one ", "</b>"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["abcd", "bc"], ["a", "b", "c"], ["", "", "a"]),
        (["bc", "abc"], ["x", "abc"], ["x", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    matcher = StopStrings(stops)
    assert [matcher.push(piece)[0] for piece in pieces] == shown


PROMPT = "ab"
IM_END = "<|im_end|>"


class Says(Sampler):
    """Draws the tokens of a text, which may spell special ones, and then "." for ever."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        vocab = len(tokenizer)
        super().__init__(SamplingParams(logprobs=0), (), frozenset(), vocab)
        self.tokens = [*tokenizer.encode(text), *tokenizer.encode("." * 20)]

    def draw(self, logits_V: Tensor, emitted: Sequence[int]) -> Draw:
        return Draw(self.tokens[len(emitted)])


def said(text: str, **options: Any) -> tuple[str, str | None, int]:
    """Text shown of a request that says something, why it ended, and its number of tokens."""
    tokenizer = byte_level_tokenizer(IM_END, "<|im_end|>2")
    model = make_model("llama", vocab_size=len(tokenizer))
    engine = AdaptiveEngine(model, tokenizer)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, **options)
    request = engine.submit(PROMPT, sampling, sampler=Says(tokenizer, text))
    events = list(engine.follow([request]))
    shown = "".join(event.text for event in events)
    return shown, events[-1].finish_reason, len(events)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (f"x{IM_END}", IM_END, ("x", "stop", 2)),
        (f"x{IM_END}\ny", f"{IM_END}\n", ("x", "stop", 3)),
        (f"x\n{IM_END}y", f"\n{IM_END}", ("x", "stop", 3)),
        (f"x{IM_END}<|end|>", f"{IM_END}<|end|>", ("x", "stop", 3)),
        (f"x{IM_END}y", f"{IM_END}\n", ("xy" + "." * 9, "length", 12)),
        (f"{IM_END}2x", f"{IM_END}2", ("", "stop", 1)),
        ("x<|end|>y", IM_END, ("xy" + "." * 9, "length", 12)),
    ],
)
def test_a_stop_string_may_spell_special_tokens(
    text: str, stop: str, expected: tuple[str, str, int]
) -> None:
    assert said(text, stop=("never there", stop)) == expected


def test_a_special_token_stops_nothing_before_min_tokens() -> None:
    text = f"x{IM_END}yz{IM_END}"
    assert said(text, stop=(IM_END,)) == ("x", "stop", 2)
    assert said(text, stop=(IM_END,), min_tokens=3) == ("xyz", "stop", 5)


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
def test_a_special_token_as_a_stop_string_ends_a_request_in_every_mode(kv_mode: KVMode) -> None:
    tokenizer = byte_level_tokenizer(IM_END)
    engine = AdaptiveEngine(make_model("llama", vocab_size=len(tokenizer)), tokenizer)
    bias = {tokenizer.convert_tokens_to_ids(IM_END): 100.0}
    sampling = SamplingParams(max_tokens=6, stop=(IM_END,), logit_bias=bias)
    [ended] = engine.generate([PROMPT], sampling, kv_mode=kv_mode)
    assert (ended.finish_reason, len(ended.token_ids), ended.text) == ("stop", 1, "")
