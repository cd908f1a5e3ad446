"""The HTTP routes over one worker. The same app runs in a Ray Serve replica and in tests."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from offramp.controller.errors import OfframpError, OverloadedError, RequestError
from offramp.deploy.http.contract import CompletionRequest
from offramp.deploy.http.replies import (
    ReplyStyle,
    chunk,
    completion,
    error_body,
    token_namer,
    usage_chunk,
)
from offramp.worker.decoding import request as sequence
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.admission import prompt_text
from offramp.worker.engine.service import EngineService

OPEN_ROUTES = ("/health", "/ready")
"""Routes that ask for no key."""

CLIENT_GONE = 499
"""Status of a reply that nobody waits for, as nginx logs it."""

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of an event stream, for proxies to pass each event on as it comes."""


class Worker(Protocol):
    """What the routes need of a worker."""

    model_id: str
    api_key: str | None
    service: EngineService
    started_at: int

    def policy_report(self) -> dict[str, Any]:
        """The running policy and the state of its refresh."""
        ...


def create_app(worker: Worker) -> FastAPI:
    """Build the app over a worker."""
    app = FastAPI(title="offramp", docs_url=None, redoc_url=None)
    _add_guard(app, worker)
    _add_error_handlers(app)
    _add_status_routes(app, worker)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        _require_model(body.model, worker)
        body.require_supported()
        # Before anything is queued, which a refusal would leave behind with nobody to read it.
        style = _style(worker, body)
        requests, events = await worker.service.submit_all(
            body.one_prompt, body.sampling, kv_mode=body.kv_mode
        )
        reply = _Reply(style, requests, events)
        return await _unless_gone(request, reply.stream() if body.stream else reply.whole())

    return app


async def _unless_gone(request: Request, reply: Coroutine[Any, Any, Response]) -> Response:
    """A reply, given up if its client hangs up before it is there.

    Not every server cancels a route whose client is gone; one that waits for its reply would keep
    its slot until the last token.
    """
    replying = asyncio.create_task(reply)
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


def _style(worker: Worker, body: CompletionRequest) -> ReplyStyle:
    tokenizer = worker.service.engine.tokenizer
    return ReplyStyle(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=worker.model_id,
        prefix=prompt_text(body.one_prompt, tokenizer) if body.echo else "",
        stats=body.offramp.stats,
        name_token=None if body.logprobs is None else token_namer(tokenizer),
        counts=bool(body.stream_options and body.stream_options.include_usage),
    )


class _Reply:
    def __init__(
        self, style: ReplyStyle, requests: list[sequence.Request], events: AsyncIterator[TokenEvent]
    ) -> None:
        self.style = style
        self.prompt_tokens = len(requests[0].prompt)
        self.events = events
        # Each choice's events so far, in the order of the choices.
        self.choices: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        self.index = {request.id: index for index, request in enumerate(requests)}

    async def whole(self) -> Response:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            async for event in self.events:
                self.choices[event.request_id].append(event)
        choices = list(self.choices.values())
        return JSONResponse(completion(self.style, self.prompt_tokens, choices))

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
                    tokens = sum(map(len, self.choices.values()))
                    yield _line(usage_chunk(self.style, self.prompt_tokens, tokens))
            except OfframpError as error:
                yield _line(error_body(str(error), "server_error", None, "decode_failed"))
        yield "data: [DONE]\n\n"

    def _chunk(self, event: TokenEvent) -> str:
        events = self.choices[event.request_id]
        events.append(event)
        index = self.index[event.request_id]
        return _line(chunk(self.style, index, event, first=len(events) == 1))


def _line(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"


def _require_model(name: str, worker: Worker) -> None:
    if name != worker.model_id:
        raise HTTPException(404, f"model: {name!r} is not served. Ask for {worker.model_id!r}.")


def _add_status_routes(app: FastAPI, worker: Worker) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(worker)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _require_model(name, worker)
        return _model(worker)

    @app.get("/v1/policy")
    async def policy() -> dict[str, Any]:
        return worker.policy_report()

    @app.get("/health")
    async def health() -> Response:
        if worker.service.is_healthy:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stuck"}, status_code=503)

    @app.get("/ready")
    async def ready() -> Response:
        waiting = worker.service.engine.load[1]
        if waiting < worker.service.max_waiting and worker.service.is_healthy:
            return JSONResponse({"status": "ready", "waiting": waiting})
        return JSONResponse({"status": "busy", "waiting": waiting}, status_code=503)


def _model(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.model_id,
        "object": "model",
        "created": worker.started_at,
        "owned_by": "offramp",
    }


def _add_guard(app: FastAPI, worker: Worker) -> None:
    expected = None if worker.api_key is None else f"Bearer {worker.api_key}"

    @app.middleware("http")
    async def guard(
        request: Request, proceed: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        if expected is not None and request.url.path not in OPEN_ROUTES:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), expected.encode()):
                body = error_body(
                    "the API key is missing or wrong", "authentication_error", None, "bad_key"
                )
                return JSONResponse(body, status_code=401)
        return await proceed(request)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        body = error_body(str(error), "invalid_request_error", error.field, "invalid_value")
        return JSONResponse(body, status_code=400)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # Of a body that is no JSON, the location is a number of bytes.
        field = next((part for part in first["loc"][1:2] if isinstance(part, str)), None)
        message = f"{field or 'body'}: {first['msg']}."
        body = error_body(message, "invalid_request_error", field, "invalid_value")
        return JSONResponse(body, status_code=400)

    @app.exception_handler(OverloadedError)
    async def overloaded(_: Request, error: OverloadedError) -> Response:
        body = error_body(str(error), "overloaded_error", None, "overloaded")
        headers = {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(body, status_code=429, headers=headers)

    @app.exception_handler(OfframpError)
    async def failed(_: Request, error: OfframpError) -> Response:
        body = error_body(str(error), "server_error", None, "decode_failed")
        return JSONResponse(body, status_code=500)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> Response:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        body = error_body(str(error.detail), "invalid_request_error", None, code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        body = error_body("the worker failed", "server_error", None, "internal_error")
        return JSONResponse(body, status_code=500)
