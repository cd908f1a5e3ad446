"""What tokens are called where their log-probabilities are reported."""

from __future__ import annotations

from transformers import ByT5Tokenizer

from offramp.deploy.http.shapes.token_texts import token_namer
from support.tokenizers import byte_fallback_tokenizer


def test_names_keep_the_space_that_begins_them() -> None:
    tokenizer = byte_fallback_tokenizer()
    name = token_namer(tokenizer)
    words = {"▁b": " b", "b": "b", "▁": " ", "<0x41>": "A", "<0xC3>": "<0xC3>"}
    named = {word: name(tokenizer.convert_tokens_to_ids(word)) for word in words}
    assert named == words


def test_a_token_that_the_tokenizer_cannot_decode_has_a_name_all_the_same() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    name = token_namer(tokenizer)
    assert name(len(tokenizer) + 40) == tokenizer.convert_ids_to_tokens(len(tokenizer) + 40)
    assert name(100) == "a"
