"""Requests that make tokens: encoded, submitted, and answered whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from offramp.controller.errors import OfframpError
from offramp.deploy.http.backend import Backend
from offramp.deploy.http.chat_prompts import encode_conversation
from offramp.deploy.http.error_replies import error_body
from offramp.deploy.http.shapes.chat_contract import ChatRequest
from offramp.deploy.http.shapes.contract import CompletionRequest, DecodingFields
from offramp.deploy.http.shapes.replies import ChatStyle, Choice, CompletionStyle, ReplyStyle
from offramp.deploy.http.shapes.token_texts import EchoedPrompt, token_namer
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.admission import Prompt, prompt_text

CLIENT_GONE = 499
"""Status of a reply that nobody waits for, as nginx logs it."""

REQUEST_ID = "X-Request-Id"
"""Header in which clients name their request, as OpenAI's and vLLM's do."""

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of an event stream, for proxies to pass each event on as it comes."""


async def complete(backend: Backend, body: CompletionRequest, request: Request) -> Response:
    """Answer POST /v1/completions."""
    # All that may be refused comes before anything is queued, which nobody would read.
    prompts, sampling, mode = body.prompts, body.sampling, body.kv_mode
    encoder = backend.encoder
    tokens = [await encoder.aside(encoder.encode, prompt) for prompt in prompts]
    style = CompletionStyle(
        id=f"cmpl-{uuid.uuid4().hex}",
        **_common(backend, body, sum(map(len, tokens)), names=body.logprobs is not None),
        made=body.candidates,
        kept=body.n,
        echoes=await encoder.aside(_echoes, backend.tokenizer, prompts, tokens)
        if body.echo
        else (),
        prompt_only=body.max_tokens == 0,
    )
    choices, events = await backend.submit_all(
        tokens, sampling, kv_mode=mode, request_id=_id_of(request, style)
    )
    return await _answer(style, choices, events, request, stream=body.stream)


async def converse(backend: Backend, body: ChatRequest, request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    conversation, sampling, mode = body.conversation, body.sampling, body.kv_mode
    tokens = await encode_conversation(backend, conversation)
    if body.most_tokens is None:
        sampling = replace(sampling, max_tokens=max(1, backend.most_tokens - len(tokens)))
    style = ChatStyle(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        **_common(backend, body, len(tokens), names=body.logprobs),
    )
    choices, events = await backend.submit_all(
        [tokens], sampling, kv_mode=mode, request_id=_id_of(request, style)
    )
    return await _answer(style, choices, events, request, stream=body.stream)


def _id_of(request: Request, style: ReplyStyle) -> str:
    """The client's own id of the request, or that of the reply."""
    return request.headers.get(REQUEST_ID) or style.id


def _common(
    backend: Backend, body: DecodingFields, prompt_tokens: int, *, names: bool
) -> dict[str, Any]:
    return {
        "created": int(time.time()),
        "model": backend.model_id,
        "prompt_tokens": prompt_tokens,
        "stats": body.offramp.stats,
        "name_token": token_namer(backend.tokenizer) if names else None,
        "counts": body.counts,
    }


def _echoes(
    tokenizer: Any, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]
) -> list[EchoedPrompt]:
    return [
        EchoedPrompt.of(prompt_text(prompt, tokenizer), each, tokenizer)
        for prompt, each in zip(prompts, tokens, strict=True)
    ]


async def _answer(
    style: ReplyStyle,
    choices: Sequence[str],
    events: AsyncIterator[TokenEvent],
    request: Request,
    *,
    stream: bool,
) -> Response:
    """A reply, given up if its client hangs up before it is there.

    Not every server cancels a route whose client is gone; one that waits for its reply would keep
    its slot until the last token.
    """
    reply = _Reply(style, choices, events)
    replying = asyncio.create_task(reply.stream() if stream else reply.whole())
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((replying, leaving), return_when=asyncio.FIRST_COMPLETED)
        return replying.result() if replying.done() else Response(status_code=CLIENT_GONE)
    finally:
        for task in (replying, leaving):
            task.cancel()
        await asyncio.gather(replying, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Reply:
    def __init__(
        self, style: ReplyStyle, choices: Sequence[str], events: AsyncIterator[TokenEvent]
    ) -> None:
        self.style = style
        self.events = events
        # Each choice's events so far, in the order of the choices.
        self.choices: dict[str, Choice] = {choice: [] for choice in choices}
        self.index = {choice: index for index, choice in enumerate(choices)}

    async def whole(self) -> Response:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            async for event in self.events:
                self.choices[event.request_id].append(event)
        return JSONResponse(self.style.reply(list(self.choices.values())))

    async def stream(self) -> Response:
        # Waiting for the first token keeps the status code honest: what fails before it is still
        # an error response, not a broken stream.
        first = await anext(self.events)
        lines = self._lines(first)
        return StreamingResponse(lines, media_type="text/event-stream", headers=UNBUFFERED)

    async def _lines(self, first: TokenEvent) -> AsyncIterator[str]:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            try:
                yield self._chunk(first)
                async for event in self.events:
                    yield self._chunk(event)
                if self.style.counts:
                    yield _line(self.style.usage_chunk(list(self.choices.values())))
            except OfframpError as error:
                yield _line(error_body(str(error), "server_error", None, "decode_failed"))
        yield "data: [DONE]\n\n"

    def _chunk(self, event: TokenEvent) -> str:
        events = self.choices[event.request_id]
        events.append(event)
        index = self.index[event.request_id]
        return _line(self.style.chunk(index, event, first=len(events) == 1))


def _line(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"
