"""Names each request, and writes a line of JSON about it once it is answered."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from logging.handlers import WatchedFileHandler
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = "X-Request-Id"
"""Header in which clients name their request, as OpenAI's and vLLM's do."""

REQUEST_NAME: ContextVar[str | None] = ContextVar("request", default=None)
"""Name of the request that is being answered, for whatever is logged meanwhile."""

WATCHERS = ("/health", "/-/healthz", "/ready", "/metrics")
"""Routes that are asked every few seconds, by no user: fine replies of theirs are details."""

_NAME = re.compile(r"[!-~]{1,128}")


class AccessLog:
    """Middleware around all others.

    Every request behind it has a name in ``X-Request-Id``, its client's or a new one, and every
    reply has it, too. ``scope["state"]`` has ``client`` for whoever tells the client by its key,
    and ``model`` for whoever finds out which one is asked.

    Args:
        app: What comes behind it.
        file: Where lines are appended; opened anew when it was moved away. None: nowhere.
        count: Told each reply's status at its end, and which model was asked, "" if none was.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        file: Path | None,
        count: Callable[[int, str], object] = lambda _, __: None,
    ) -> None:
        self._app = app
        self._count = count
        # One of its own, whose lines also go where all others go: an app more is a file more.
        self._log = logging.Logger("offramp.access", logging.DEBUG)
        self._log.parent = logging.getLogger()
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            handler = WatchedFileHandler(file)
            handler.setFormatter(_FieldsFormatter())
            self._log.addHandler(handler)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 0
        headers = Headers(scope=scope)
        name = headers.get(REQUEST_ID, "")
        if not _NAME.fullmatch(name):
            name = uuid.uuid4().hex
        # Never reset: a server answers each request in a context of its own, and logs in it later.
        REQUEST_NAME.set(name)
        scope = {
            **scope,
            "headers": _renamed(headers, name),
            "state": {"client": None, "model": ""},
        }

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            self._count(status, scope["state"]["model"])
            if self._log.hasHandlers():
                self._write(scope, name, status, time.perf_counter() - began_s)

    def _write(self, scope: Scope, name: str, status: int, took_s: float) -> None:
        fields = {
            "at": time.time(),
            "request_id": name,
            "client": scope["state"]["client"],
            "model": scope["state"]["model"],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(took_s, 6),
        }
        is_detail = scope["path"] in WATCHERS and status == 200
        level = logging.DEBUG if is_detail else logging.INFO
        self._log.log(level, "answered", extra={"fields": fields})


class _FieldsFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(record.__dict__["fields"])


def _renamed(headers: Headers, name: str) -> list[tuple[bytes, bytes]]:
    key = REQUEST_ID.lower().encode()
    return [(each, value) for each, value in headers.raw if each != key] + [(key, name.encode())]
