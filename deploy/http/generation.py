"""Requests that make tokens: encoded, submitted, and answered whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from offramp.deploy.clients.quotas import Quotas
from offramp.deploy.http.backend import Backend, Direct, Tokens
from offramp.deploy.http.chat_prompts import encode_conversation
from offramp.deploy.http.limits import DeadlineError, HttpLimits, until, wish_within
from offramp.deploy.http.observability.access_log import REQUEST_ID
from offramp.deploy.http.observability.metrics import ModelMetrics
from offramp.deploy.http.observability.tracing import Spans
from offramp.deploy.http.reply import WRITE, Events, Reply
from offramp.deploy.http.shapes.chat_contract import ChatRequest
from offramp.deploy.http.shapes.contract import CompletionRequest, DecodingFields
from offramp.deploy.http.shapes.replies import ChatStyle, CompletionStyle, ReplyStyle
from offramp.deploy.http.shapes.token_texts import EchoedPrompt, token_namer
from offramp.worker.engine.encoding import Prompt, prompt_text

CLIENT_GONE = 499
"""Status of a reply that nobody waits for, as nginx logs it."""


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
        submit: Callable[..., Awaitable[Events]],
        began_s: float,
        body: DecodingFields,
        request: Request,
    ) -> Response:
        """A reply, given up if its client hangs up before it is there, or before it is accepted."""
        direct = Direct()

        async def answered() -> Response:
            left_s = self._limits.deadline_s - (time.perf_counter() - began_s)
            try:
                async with asyncio.timeout(left_s):
                    accepted = await submit(direct=direct)
            except TimeoutError as error:
                raise DeadlineError("the request's deadline has passed") from error
            left_s = self._limits.deadline_s - (time.perf_counter() - began_s)
            end_s = asyncio.get_running_loop().time() + left_s
            following = self._following(choices, began_s, request, direct)
            reply = Reply(style, choices, until(accepted, end_s, following))
            if not body.stream:
                return await reply.whole()
            write = request.scope.get("extensions", {}).get(WRITE)
            return await reply.stream(direct, write)

        return await _unless_gone(answered(), request)

    @contextmanager
    def _following(
        self, choices: int, began_s: float, request: Request, direct: Direct
    ) -> Iterator[Callable[[Tokens], None]]:
        with self._counting(choices, began_s, request) as count:
            direct.told = count
            yield count

    @contextmanager
    def _counting(
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
