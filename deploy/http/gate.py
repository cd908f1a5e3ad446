"""What every request passes before any route, so that what is refused costs next to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.controller.errors import OverloadedError
from offramp.deploy.clients.quotas import QuotaError, Quotas
from offramp.deploy.http.error_replies import (
    error_reply,
    overload_reply,
    quota_reply,
    unavailable_reply,
)
from offramp.deploy.http.json_size import json_values
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.served_models import ServedModels, UnavailableError
from offramp.worker.engine.service import RETRY_AFTER_S

OPEN_ROUTES = ("/health", "/-/healthz", "/ready")
"""Routes that ask for no key."""

DECODING_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/score")
"""Routes that take a place in line."""


class Gate:
    """Middleware in front of the routes.

    It asks for the key, refuses requests while there is nobody or no room to serve them, counts
    what each key asks for, bounds bodies, and answers HEAD as GET without its body.

    Args:
        app: What comes behind it.
        models: Say whether requests can be taken, and tell clients by their keys.
        limits: Bounds bodies.
        quotas: Counts what clients ask.
    """

    def __init__(
        self, app: ASGIApp, *, models: ServedModels, limits: HttpLimits, quotas: Quotas
    ) -> None:
        self._app = app
        self._models = models
        self._limits = limits
        self._quotas = quotas
        self._inside = 0
        self._entering = asyncio.Lock()
        # Made once: many get the same refusal at once, and they are to get it soon.
        self._full = overload_reply(OverloadedError(RETRY_AFTER_S))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        refusal = self._refusal(scope)
        if _makes_tokens(scope):
            send = self._with_quota(scope["state"]["client"], send)
        if refusal is not None:
            await refusal(scope, receive, send)
        elif scope["method"] == "POST":
            await self._let_in_whole(scope, self._bounded(receive), send)
        else:
            await self._app(scope, receive, send)

    async def _let_in_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through once its body is there, unless parsing it would take too long."""
        parts: list[Message] = []
        try:
            while not parts or parts[-1].get("more_body"):
                parts.append(await receive())
                if parts[-1]["type"] == "http.disconnect":
                    return  # many who leave at once would take all places for a moment
        except HTTPException as error:
            await error_reply(error.status_code, error.detail)(scope, receive, send)
            return
        if self._is_costly(parts):
            await error_reply(413, self._too_many)(scope, receive, send)
            return
        coming = iter(parts)

        async def receive_again() -> Message:
            part = next(coming, None)
            return await receive() if part is None else part

        enter = self._let_decode if _makes_tokens(scope) else self._app
        await enter(scope, receive_again, send)

    async def _let_decode(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request whose body is there a place, or refuse it.

        Of many that come at once a model's pool counts none before the first is parsed, encoded and
        queued; and one whose body comes slowly holds no place. Those that get one enter one by one,
        a turn of the event loop each: to parse and submit takes ten times as long as to refuse, and
        a crowd that is refused would wait for all who are not.
        """
        if self._is_full:
            await self._full(scope, receive, send)
            return
        self._inside += 1
        try:
            async with self._entering:
                await asyncio.sleep(0)
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1

    def _is_costly(self, parts: Sequence[Message]) -> bool:
        # A value takes a byte or more.
        if sum(len(part.get("body", b"")) for part in parts) <= self._limits.body_values:
            return False
        body = b"".join(part.get("body", b"") for part in parts)
        return json_values(body) > self._limits.body_values

    @property
    def _is_full(self) -> bool:
        outstanding, capacity = self._models.load()
        # A request inside is outstanding from some moment on, with one completion or several.
        return max(outstanding, self._inside) >= capacity

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._lets_in(scope, headers):
            return error_reply(
                401,
                "the API key is missing or wrong",
                kind="authentication_error",
                code="bad_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] != "POST":
            return None
        length = headers.get("content-length", "")
        if length.isdecimal() and len(length) < 19 and int(length) > self._limits.body_bytes:
            # The server reads the rest and drops it, or the client would not see the answer.
            return error_reply(413, self._too_large)
        return self._unavailable(scope) or self._spent(scope)

    def _spent(self, scope: Scope) -> Response | None:
        try:
            if _makes_tokens(scope):
                self._quotas.take(scope["state"]["client"], "requests")
        except QuotaError as error:
            return quota_reply(error)
        return None

    def _with_quota(self, client: str | None, send: Send) -> Send:
        """Tell a client what is left to it, with whatever it is answered."""

        if not self._quotas.of(client).bounds_requests:
            return send

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quotas.headers(client))
            await send(message)

        return send_told

    def _unavailable(self, scope: Scope) -> Response | None:
        trouble = self._models.trouble()
        if trouble is not None:
            return unavailable_reply(UnavailableError(trouble))
        if _makes_tokens(scope) and self._is_full:
            return self._full
        return None

    def _lets_in(self, scope: Scope, headers: Headers) -> bool:
        clients = self._models.clients
        if not clients.are_asked_for or scope["path"] in OPEN_ROUTES:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        client = clients.client(key) if scheme.lower() == "bearer" else None
        scope["state"]["client"] = client
        return client is not None

    @property
    def _too_large(self) -> str:
        return f"body: exceeds {self._limits.body_bytes} bytes. Shorten it."

    @property
    def _too_many(self) -> str:
        most = self._limits.body_values
        return f"body: holds more than {most} JSON values. Send several requests, or text."

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a body whose length was not told."""
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limits.body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return receive_some


def _makes_tokens(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"] in DECODING_ROUTES


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head
