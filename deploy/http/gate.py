"""What every request passes before any route, so that what is refused costs next to nothing."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.controller.errors import OverloadedError
from offramp.deploy.clients.quotas import QuotaError, Quotas
from offramp.deploy.http.backend import Backend
from offramp.deploy.http.error_replies import error_reply, overload_reply, quota_reply
from offramp.worker.engine.service import RETRY_AFTER_S

OPEN_ROUTES = ("/health", "/ready")
"""Routes that ask for no key."""

DECODING_ROUTES = ("/v1/completions", "/v1/chat/completions")
"""Routes that take a place in line."""


class Gate:
    """Middleware in front of the routes.

    It asks for the key, refuses requests while there is nobody or no room to serve them, counts
    what each key asks for, bounds bodies, and answers HEAD as GET without its body.

    Args:
        app: What comes behind it.
        backend: Says whether requests can be taken, and tells clients by their keys.
        body_bytes: Most bytes of a body.
        quotas: Counts what clients ask.
    """

    def __init__(self, app: ASGIApp, *, backend: Backend, body_bytes: int, quotas: Quotas) -> None:
        self._app = app
        self._backend = backend
        self._body_bytes = body_bytes
        self._quotas = quotas
        self._inside = 0

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
        elif _makes_tokens(scope):
            await self._let_decode(scope, self._bounded(receive), send)
        else:
            await self._app(scope, self._bounded(receive), send)

    async def _let_decode(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request a place once its body is there, or refuse it.

        Of many that come at once the backend counts none before the first is parsed, encoded and
        queued; and one whose body comes slowly holds no place.
        """
        parts: list[Message] = []
        try:
            while not parts or parts[-1].get("more_body"):
                parts.append(await receive())
        except HTTPException as error:
            await error_reply(error.status_code, error.detail)(scope, receive, send)
            return
        if self._is_full:
            await overload_reply(OverloadedError(RETRY_AFTER_S))(scope, receive, send)
            return
        coming = iter(parts)

        async def receive_again() -> Message:
            part = next(coming, None)
            return await receive() if part is None else part

        self._inside += 1
        try:
            await self._app(scope, receive_again, send)
        finally:
            self._inside -= 1

    @property
    def _is_full(self) -> bool:
        outstanding, capacity = self._backend.load()
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
        if length.isdecimal() and len(length) < 19 and int(length) > self._body_bytes:
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

        async def send_told(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quotas.headers(client))
            await send(message)

        return send_told if self._quotas.of(client).to_values() else send

    def _unavailable(self, scope: Scope) -> Response | None:
        trouble = self._backend.trouble()
        if trouble is not None:
            headers = {"Retry-After": str(RETRY_AFTER_S)}
            message = f"the server takes no requests now: it is {trouble}"
            code = trouble.replace(" ", "_")
            return error_reply(503, message, kind="server_error", code=code, headers=headers)
        if _makes_tokens(scope) and self._is_full:
            return overload_reply(OverloadedError(RETRY_AFTER_S))
        return None

    def _lets_in(self, scope: Scope, headers: Headers) -> bool:
        clients = self._backend.clients
        if not clients.are_asked_for or scope["path"] in OPEN_ROUTES:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        client = clients.client(key) if scheme.lower() == "bearer" else None
        scope["state"]["client"] = client
        return client is not None

    @property
    def _too_large(self) -> str:
        return f"body: exceeds {self._body_bytes} bytes. Shorten it."

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a body whose length was not told."""
        received = 0

        async def receive_some() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
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
