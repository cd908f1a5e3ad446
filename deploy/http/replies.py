"""What comes back over HTTP: completions, chunks and errors, in OpenAI's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.worker.decoding.request import CompletionStats, FinishReason, TokenEvent
from offramp.worker.engine.detokenize import UNFINISHED
from offramp.worker.engine.engine import mean_layer

LEAST_LOGPROB = -9999.0
"""JSON has neither infinity nor NaN; this is vLLM's stand-in, and clients can add it up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyStyle:
    """What every body of one reply has in common, and what it reports.

    Attributes:
        id: Identifier of the completion.
        created: Unix time, seconds.
        model: Name of the model.
        prefix: Text put before each choice's (the echoed prompt).
        stats: Report exit depths, policy generation and, at the end, what it cost.
        name_token: Text of a token id, to report log-probabilities; None reports none.
        counts: Whether a stream counts its tokens in a last chunk; then the others have a null.
    """

    id: str
    created: int
    model: str
    prefix: str = ""
    stats: bool = False
    name_token: Callable[[int], str] | None = None
    counts: bool = False


def chunk(style: ReplyStyle, index: int, event: TokenEvent, *, first: bool) -> dict[str, Any]:
    """One streamed token of one choice."""
    text = style.prefix + event.text if first else event.text
    body = _body(style, [_choice(style, index, text, [event])])
    if style.counts:
        body["usage"] = None
    if style.stats:
        body["offramp"] = {
            "generation": event.generation,
            "exit_layer": event.exit_layer,
            "token": event.token,
            **_cost(event.stats),
        }
    return body


def usage_chunk(style: ReplyStyle, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """The last chunk, when usage was asked for."""
    return {**_body(style, []), "usage": usage(prompt_tokens, tokens)}


def completion(
    style: ReplyStyle, prompt_tokens: int, choices: Sequence[list[TokenEvent]]
) -> dict[str, Any]:
    """The whole answer of a request that does not stream.

    With statistics, a single choice has them beside it, of several each has its own.
    """
    body = _body(style, [_whole(style, index, events) for index, events in enumerate(choices)])
    body["usage"] = usage(prompt_tokens, sum(map(len, choices)))
    if style.stats:
        places = [body] if len(choices) == 1 else body["choices"]
        for place, events in zip(places, choices, strict=True):
            place["offramp"] = _stats(events)
    return body


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Count tokens as OpenAI's usage block does."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Make a body of OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def token_namer(tokenizer: Any) -> Callable[[int], str]:
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


def legacy_logprobs(events: Sequence[TokenEvent], name: Callable[[int], str]) -> dict[str, Any]:
    """The ``logprobs`` block of /v1/completions.

    ``top_logprobs`` holds the drawn token too, so up to one more than asked for; of tokens with
    one name the likeliest. ``text_offset`` counts characters of the text as decoded: tokens of a
    stop string lie beyond the text that is shown.
    """
    return {
        "tokens": [name(event.token) for event in events],
        "token_logprobs": [_finite(event.logprob) for event in events],
        "top_logprobs": [_top(event, name) for event in events],
        "text_offset": [event.text_offset for event in events],
    }


def _top(event: TokenEvent, name: Callable[[int], str]) -> dict[str, float | None]:
    named: dict[str, float | None] = {}
    for token, logprob in event.top_logprobs:
        named.setdefault(name(token), _finite(logprob))
    named.setdefault(name(event.token), _finite(event.logprob))
    return named


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB


def _stats(events: Sequence[TokenEvent]) -> dict[str, Any]:
    layers = [event.exit_layer for event in events]
    return {
        "generation": events[-1].generation,
        "exit_layers": layers,
        "mean_exit_layer": mean_layer(layers),
        **_cost(events[-1].stats),
    }


def _cost(stats: CompletionStats | None) -> dict[str, Any]:
    """What a completion cost; nothing before its last token."""
    if stats is None:
        return {}
    return {
        "layer_calls": stats.layer_calls,
        "copy_calls": stats.copy_calls,
        "exact_share": stats.exact_share,
        "drafts": stats.drafts,
        "drafts_accepted": stats.drafts_accepted,
    }


def _whole(style: ReplyStyle, index: int, events: list[TokenEvent]) -> dict[str, Any]:
    text = style.prefix + "".join(event.text for event in events)
    return _choice(style, index, text, events)


def _choice(
    style: ReplyStyle, index: int, text: str, events: Sequence[TokenEvent]
) -> dict[str, Any]:
    reason: FinishReason | None = events[-1].finish_reason
    name = style.name_token
    return {
        "index": index,
        "text": text,
        "logprobs": None if name is None else legacy_logprobs(events, name),
        "finish_reason": reason,
    }


def _body(style: ReplyStyle, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": style.id,
        "object": "text_completion",
        "created": style.created,
        "model": style.model,
        "choices": choices,
    }
