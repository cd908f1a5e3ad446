"""Tokens by name, and their log-probabilities as OpenAI's two APIs report them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict  # pydantic reads these before Python 3.12

from offramp.worker.decoding.request import TokenEvent
from offramp.worker.decoding.sampler import Draw
from offramp.worker.engine.detokenize import UNFINISHED, StreamDecoder

LEAST_LOGPROB = -9999.0
"""JSON has neither infinity nor NaN; this is vLLM's stand-in, and clients can add it up."""

Namer = Callable[[int], str]


def token_namer(tokenizer: Any) -> Namer:
    """Names tokens by their text, or, where they have none or half a character, by their entry."""

    def decode(*tokens: int) -> str:
        try:
            return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
        except Exception:  # a tokenizer may not know every id that a head can give
            return UNFINISHED

    def name(token: int) -> str:
        text = decode(token)
        if UNFINISHED in text:
            return str(tokenizer.convert_ids_to_tokens(token))
        # The text behind some other, here itself: at the beginning of a text its space is dropped.
        return decode(token, token)[len(text) :]

    return name


class LegacyLogprobs(TypedDict):
    """The ``logprobs`` block of /v1/completions."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class RankedToken(TypedDict):
    """One token of a conversation's ``logprobs``; ``bytes`` are its name's in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(RankedToken):
    """A drawn token, with the likeliest in its place."""

    top_logprobs: list[RankedToken]


class ChatLogprobs(TypedDict):
    """The ``logprobs`` block of /v1/chat/completions."""

    content: list[ChatToken]


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that is put before its completions.

    Attributes:
        text: What it reads as.
        tokens: Token ids that it was encoded to.
        offsets: Characters of the text before each of them.
    """

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int]

    @classmethod
    def of(cls, text: str, tokens: Sequence[int], tokenizer: Any) -> EchoedPrompt:
        """Find out where each token of a prompt begins in its text."""
        decoder, offsets, length = StreamDecoder(tokenizer), [], 0
        for token in tokens:
            offsets.append(length)
            length += len(decoder.push(token))
        return cls(text, tokens, offsets)


def legacy_logprobs(events: Sequence[TokenEvent], name: Namer, start: int = 0) -> LegacyLogprobs:
    """Report tokens as /v1/completions does.

    ``top_logprobs`` holds the drawn token too, so up to one more than asked for; of tokens with
    one name the likeliest. ``text_offset`` counts characters of the text as decoded, from
    ``start`` on: tokens of a stop string lie beyond the text that is shown.
    """
    drawn = [Draw(event.token, event.logprob, event.top_logprobs) for event in events]
    return LegacyLogprobs(
        tokens=[name(each.token) for each in drawn],
        token_logprobs=[_finite(each.logprob) for each in drawn],
        top_logprobs=[_top(each, name) for each in drawn],
        text_offset=[start + event.text_offset for event in events],
    )


def prompt_logprobs(draws: Iterable[Draw], name: Namer, echoed: EchoedPrompt) -> LegacyLogprobs:
    """Report an echoed prompt's tokens as /v1/completions does; the first has none before it."""
    drawn = list(draws)
    return LegacyLogprobs(
        tokens=[name(token) for token in echoed.tokens],
        token_logprobs=[None, *(_finite(each.logprob) for each in drawn)],
        top_logprobs=[None, *(_top(each, name) for each in drawn)],
        text_offset=list(echoed.offsets),
    )


def joined(first: LegacyLogprobs, second: LegacyLogprobs) -> LegacyLogprobs:
    """One block of two."""
    return LegacyLogprobs(
        tokens=first["tokens"] + second["tokens"],
        token_logprobs=first["token_logprobs"] + second["token_logprobs"],
        top_logprobs=first["top_logprobs"] + second["top_logprobs"],
        text_offset=first["text_offset"] + second["text_offset"],
    )


def chat_logprobs(events: Sequence[TokenEvent], name: Namer) -> ChatLogprobs:
    """Report tokens as /v1/chat/completions does."""
    return ChatLogprobs(
        content=[
            ChatToken(
                **_ranked(event.token, event.logprob, name),
                top_logprobs=[_ranked(*each, name) for each in event.top_logprobs],
            )
            for event in events
        ]
    )


def _ranked(token: int, logprob: float | None, name: Namer) -> RankedToken:
    text = name(token)
    return RankedToken(token=text, logprob=_finite(logprob), bytes=list(text.encode()))


def _top(drawn: Draw, name: Namer) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, logprob in (*drawn.top, (drawn.token, drawn.logprob)):
        named.setdefault(name(token), _finite(logprob))
    return named


def _finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    if logprob is None or not math.isfinite(logprob):
        return LEAST_LOGPROB
    return max(logprob, LEAST_LOGPROB)
