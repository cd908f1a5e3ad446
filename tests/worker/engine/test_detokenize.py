"""Streamed text against the tokenizer's own decoding of all tokens at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.detokenize import UNFINISHED, StreamDecoder
from support.models import make_model
from support.tokenizers import byte_fallback_tokenizer

quick = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def tokenizer(reference: AdaptiveEngine) -> Any:
    return reference.tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    return byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def word_piece() -> Any:
    """Like BERT's: its clean-up takes back the space before a comma."""
    words = ["[UNK]", "well", ",", "he", "do", "n", "'", "t", ".", "##ly"]
    core = Tokenizer(
        models.WordPiece(vocab={word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    core.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", clean_up_tokenization_spaces=True
    )


def pieces(tokenizer: Any, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    decoder = StreamDecoder(tokenizer, prompt or [])
    last = len(tokens) - 1
    return [decoder.push(token, last=index == last) for index, token in enumerate(tokens)]


def whole(tokenizer: Any, tokens: list[int]) -> str:
    return str(
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


@pytest.mark.parametrize(
    "text",
    [
        "naïve Größe, Übermut",
        "日本語のテキスト",
        "👩‍👩‍👧‍👦 and 🇩🇪",
        "e\u0301 \u200d \u202e",
        "a\ufffdb\ufffd",
        "\n\t  \n",
    ],
)
def test_pieces_make_up_the_text(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, tokens)) == text


def test_a_character_comes_whole_with_its_last_byte(tokenizer: Any) -> None:
    tokens = tokenizer.encode("🦩")
    assert len(tokens) > 1
    assert pieces(tokenizer, tokens) == [""] * (len(tokens) - 1) + ["🦩"]


def test_half_a_character_at_the_end_is_marked(tokenizer: Any) -> None:
    tokens = tokenizer.encode("ok 🦩")[:-1]
    streamed = pieces(tokenizer, tokens)
    assert "".join(streamed) == whole(tokenizer, tokens)
    assert streamed[-1].endswith(UNFINISHED)


def test_special_tokens_are_left_out(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    tokens = [*tokenizer.encode("x = 1"), end]
    assert pieces(tokenizer, tokens)[-1] == ""
    assert "".join(pieces(tokenizer, tokens)) == "x = 1"


@quick
@given(text=st.text(max_size=60))
@example("ß" * 40)
@example("🦩" * 20)
def test_any_text_streams_whole(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.encode(text)
    streamed = pieces(tokenizer, tokens)
    assert "".join(streamed) == text
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in streamed)


@quick
@given(tokens=st.lists(st.integers(0, 4095), max_size=40))
def test_any_tokens_stream_as_they_decode(tokenizer: Any, tokens: list[int]) -> None:
    assert "".join(pieces(tokenizer, tokens)) == whole(tokenizer, tokens)


@quick
@given(text=st.text(alphabet="ab é🦩", max_size=30))
@example("  a  b")
def test_spaces_survive_a_decoder_that_drops_the_first(byte_fallback: Any, text: str) -> None:
    tokens = byte_fallback.encode(text)
    streamed = pieces(byte_fallback, tokens)
    assert "".join(streamed) == whole(byte_fallback, tokens)
    if tokens:
        assert "".join(streamed) == text


@quick
@given(tokens=st.lists(st.integers(1, 9), max_size=25))
@example([1, 2, 3, 4, 5, 6, 7, 8])
def test_no_clean_up_takes_back_what_was_shown(word_piece: Any, tokens: list[int]) -> None:
    assert "".join(pieces(word_piece, tokens)) == whole(word_piece, tokens)


def test_generate_returns_the_text_of_its_tokens(reference: AdaptiveEngine) -> None:
    for completion in reference.generate(["# Ü", "🦩🦩", "def f("]):
        assert completion.text == whole(reference.tokenizer, completion.token_ids)


@quick
@given(
    prompt=st.text(alphabet="ab é🦩", min_size=1, max_size=12),
    text=st.text(alphabet="ab é🦩", max_size=12),
)
@example("a", " b")
@example("a ", " b")
@example("🦩🦩", "🦩")
def test_a_completion_reads_on_from_its_prompt(byte_fallback: Any, prompt: str, text: str) -> None:
    before = byte_fallback.encode(prompt)
    tokens = byte_fallback.encode(prompt + text)[len(before) :]
    streamed = "".join(pieces(byte_fallback, tokens, before))
    assert prompt + streamed == whole(byte_fallback, [*before, *tokens])


def test_a_character_that_the_prompt_began_is_shown(tokenizer: Any) -> None:
    tokens = tokenizer.encode("ok 🦩")
    assert pieces(tokenizer, tokens[-1:], tokens[:-1]) == ["🦩"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_the_first_space_of_a_completion_is_kept(byte_fallback: Any, as_ids: bool) -> None:
    engine = AdaptiveEngine(make_model("llama", vocab_size=len(byte_fallback)), byte_fallback)
    ids = byte_fallback.encode("a")
    prompt = ids if as_ids else "a"
    spaced = byte_fallback.convert_tokens_to_ids("▁b")
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, logit_bias={spaced: 100})
    assert engine.generate([prompt], sampling, echo=True)[0].text == "a b b"
    assert [event.text for event in engine.stream(prompt, sampling)] == [" b", " b"]
