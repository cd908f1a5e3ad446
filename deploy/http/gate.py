"""What every request passes before any route: the key, and HEAD as a GET without its body."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp.deploy.http.error_replies import error_reply

OPEN_ROUTES = ("/health", "/ready")
"""Routes that ask for no key."""


class Gate:
    """Middleware in front of the routes.

    Args:
        app: What comes behind it.
        api_key: What clients must present; None asks for none.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        if self._lets_in(scope):
            await self._app(scope, receive, send)
            return
        reply = error_reply(
            401,
            "the API key is missing or wrong",
            kind="authentication_error",
            code="bad_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await reply(scope, receive, send)

    def _lets_in(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN_ROUTES:
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), self._expected)


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head
