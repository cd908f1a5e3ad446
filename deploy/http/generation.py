"""Requests that make tokens: encoded, submitted, and answered whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json

from offramp.controller.errors import OfframpError
from offramp.deploy.clients.quotas import Quotas
from offramp.deploy.http.backend import Backend, Tokens
from offramp.deploy.http.chat_prompts import encode_conversation
from offramp.deploy.http.error_replies import error_body
from offramp.deploy.http.limits import DeadlineError, HttpLimits, until, wish_within
from offramp.deploy.http.observability.access_log import REQUEST_ID
from offramp.deploy.http.observability.metrics import ModelMetrics
from offramp.deploy.http.observability.tracing import Spans
from offramp.deploy.http.shapes.chat_contract import ChatRequest
from offramp.deploy.http.shapes.contract import CompletionRequest, DecodingFields
from offramp.deploy.http.shapes.replies import ChatStyle, Choice, CompletionStyle, ReplyStyle
from offramp.deploy.http.shapes.token_texts import EchoedPrompt, token_namer
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.admission import Prompt, prompt_text

_logger = logging.getLogger(__name__)

Events = AsyncIterator[Tokens]

CLIENT_GONE = 499
"""Status of a reply that nobody waits for, as nginx logs it."""

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of an event stream, for proxies to pass each event on as it comes."""


BLANK = uuid.uuid4().hex
"""A text that nothing else in a chunk is equal to."""


class Generation:
    """Answers the routes that make tokens.

    Args:
        backend: What decodes.
        limits: How much and how long a client may ask.
        metrics: Told of every token.
        quotas: Says what each client may ask, and counts it.
        spans: Makes a span of each request; None: there are no traces.
    """

    def __init__(
        self,
        backend: Backend,
        limits: HttpLimits,
        metrics: ModelMetrics,
        quotas: Quotas,
        spans: Spans | None = None,
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._metrics = metrics
        self._quotas = quotas
        self._spans = spans

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer POST /v1/completions."""
        # All that may be refused comes before anything is queued, which nobody would read.
        began_s = time.perf_counter()
        backend, encoder = self._backend, self._backend.encoder
        prompts, sampling = body.prompts, body.sampling
        mode = wish_within(self._quotas.of(_client(request)), body.kv_mode)
        choices = len(prompts) * sampling.n
        self._limits.require_choices(choices, "prompt" if len(prompts) > 1 else "n")
        tokens = [await encoder.aside(encoder.encode, prompt) for prompt in prompts]
        most = sum(map(len, tokens)) + choices * sampling.max_tokens
        self._quotas.take(_client(request), "tokens", most)
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
        submit = partial(
            backend.submit_all,
            tokens,
            sampling,
            kv_mode=mode,
            prefill=body.prefill,
            request_id=request.headers[REQUEST_ID],
            cache_salt=_salt(body, request),
        )
        return await self._answer(style, choices, submit, began_s, body, request)

    async def converse(self, body: ChatRequest, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        began_s = time.perf_counter()
        backend = self._backend
        conversation, sampling = body.conversation, body.sampling
        mode = wish_within(self._quotas.of(_client(request)), body.kv_mode)
        self._limits.require_choices(sampling.n, "n")
        tokens = await encode_conversation(backend, conversation)
        if body.most_tokens is None:
            sampling = replace(sampling, max_tokens=max(1, backend.most_tokens - len(tokens)))
        most = len(tokens) + sampling.n * sampling.max_tokens
        self._quotas.take(_client(request), "tokens", most)
        style = ChatStyle(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            **_common(backend, body, len(tokens), names=body.logprobs),
        )
        submit = partial(
            backend.submit_all,
            [tokens],
            sampling,
            kv_mode=mode,
            prefill=body.prefill,
            request_id=request.headers[REQUEST_ID],
            cache_salt=_salt(body, request),
        )
        return await self._answer(style, sampling.n, submit, began_s, body, request)

    async def _answer(
        self,
        style: ReplyStyle,
        choices: int,
        submit: Callable[[], Awaitable[Events]],
        began_s: float,
        body: DecodingFields,
        request: Request,
    ) -> Response:
        """A reply, given up if its client hangs up before it is there, or before it is accepted."""

        async def answered() -> Response:
            left_s = self._limits.deadline_s - (time.perf_counter() - began_s)
            try:
                async with asyncio.timeout(left_s):
                    accepted = await submit()
            except TimeoutError as error:
                raise DeadlineError("the request's deadline has passed") from error
            events = self._followed(accepted, choices, began_s, request)
            reply = _Reply(style, choices, events)
            return await (reply.stream() if body.stream else reply.whole())

        return await _unless_gone(answered(), request)

    def _followed(self, events: Events, choices: int, began_s: float, request: Request) -> Events:
        left_s = self._limits.deadline_s - (time.perf_counter() - began_s)
        end_s = asyncio.get_running_loop().time() + left_s
        return until(events, end_s, self._following(choices, began_s, request))

    @contextmanager
    def _following(
        self, choices: int, began_s: float, request: Request
    ) -> Iterator[Callable[[Tokens], None]]:
        with self._metrics.following(choices, began_s) as count:
            if self._spans is None:
                yield count
                return
            about = {
                "gen_ai.request.model": self._backend.model_id,
                "gen_ai.request.id": request.headers[REQUEST_ID],
                "gen_ai.request.choice.count": choices,
                "http.route": request.url.path,
            }
            with self._spans.following(request.headers, about, began_s) as note:

                def tell(tokens: Tokens) -> None:
                    count(tokens)
                    note(tokens)

                yield tell


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


def _salt(body: DecodingFields, request: Request) -> str:
    """With whom what is kept of a request's prompt is shared: never another client.

    How soon the first token comes tells whether a prompt's beginning was known.
    """
    return json.dumps([_client(request), body.cache_salt])


def _client(request: Request) -> str | None:
    name: str | None = getattr(request.state, "client", None)
    return name


def _echoes(
    tokenizer: Any, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]
) -> list[EchoedPrompt]:
    return [
        EchoedPrompt.of(prompt_text(prompt, tokenizer), each, tokenizer)
        for prompt, each in zip(prompts, tokens, strict=True)
    ]


async def _unless_gone(answered: Coroutine[Any, Any, Response], request: Request) -> Response:
    """A reply, or none as soon as its client hangs up.

    Not every server cancels a route whose client is gone; one that waits for its reply would keep
    its slot until the last token.
    """
    replying = asyncio.create_task(answered)
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
    def __init__(self, style: ReplyStyle, choices: int, events: Events) -> None:
        self.style = style
        self.events = events
        self.choices: list[Choice] = [[] for _ in range(choices)]
        # By choice, what comes before and after the text of each chunk: most differ in nothing
        # else, and to encode all of each took a sixth of what the front does for a token.
        self._around: dict[int, list[bytes]] = {}

    async def whole(self) -> Response:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            async for tokens in self.events:
                for index, event in tokens:
                    self.choices[index].append(event)
        return JSONResponse(self.style.reply(self.choices))

    async def stream(self) -> Response:
        # Waiting for the first token keeps the status code honest: what fails before it is still
        # an error response, not a broken stream.
        first = await anext(self.events)
        lines = self._lines(first)
        return StreamingResponse(lines, media_type="text/event-stream", headers=UNBUFFERED)

    async def _lines(self, first: Tokens) -> AsyncIterator[bytes]:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            try:
                yield self._chunks(first)
                async for tokens in self.events:
                    yield self._chunks(tokens)
                if self.style.counts:
                    yield _line(self.style.usage_chunk(self.choices))
            except OfframpError as error:
                _logger.warning("a stream ended with an error: %s", error)
                yield _line(error_body(str(error), "server_error", None, "decode_failed"))
        yield b"data: [DONE]\n\n"

    def _chunks(self, tokens: Tokens) -> bytes:
        """An event per token; those that came together are sent together."""
        return b"".join(self._chunk(index, event) for index, event in tokens)

    def _chunk(self, index: int, event: TokenEvent) -> bytes:
        events = self.choices[index]
        events.append(event)
        if len(events) == 1 or event.finish_reason is not None or not self.style.has_plain_chunks:
            return _line(self.style.chunk(index, event, first=len(events) == 1))
        around = self._around.get(index)
        if around is None:
            blank = self.style.chunk(index, event._replace(text=BLANK), first=False)
            around = self._around[index] = _line(blank).split(to_json(BLANK))
        return to_json(event.text).join(around)


def _line(body: Any) -> bytes:
    # Of what the front does for a token, json's own encoder took a tenth.
    return b"data: %b\n\n" % to_json(body, inf_nan_mode="null")
