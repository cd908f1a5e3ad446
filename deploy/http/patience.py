"""A connection to a client that is given up when the client is too slow."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from offramp.deploy.http.error_replies import error_body
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.reply import WRITE


def _raw_error(status: str, message: str) -> bytes:
    code = status.split(" ", 1)[1].lower().replace(" ", "_")
    body = json.dumps(error_body(message, "invalid_request_error", None, code)).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


_TOO_SLOW = _raw_error("408 Request Timeout", "the request took too long to arrive")


def _write(found: weakref.ref[RequestResponseCycle], make: Callable[[], bytes]) -> bool:
    """See ``Write``: a client that is to be waited for gets nothing this way."""
    cycle = found()
    if (
        cycle is None
        or cycle.flow.write_paused
        or not cycle.response_started
        or cycle.response_complete
    ):
        return False
    sending = cycle.send({"type": "http.response.body", "body": make(), "more_body": True})
    with suppress(StopIteration):
        sending.send(None)  # which waits for nothing then
    return True


class LimitedConfig(uvicorn.Config):
    """A server's settings, with bounds on its clients' patience.

    Attributes:
        limits: The bounds.
    """

    limits = HttpLimits()


class PatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 with time limits on what the client has to do: to send, and to read."""

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    @property
    def _limits(self) -> HttpLimits:
        assert isinstance(self.config, LimitedConfig)
        return self.config.limits

    def _arm(self, seconds: float, give_up: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _no_headers(self) -> None:
        self._give_up(can_answer=self.cycle is None or self.cycle.response_complete)

    def _no_body(self) -> None:
        self._give_up(can_answer=not self.cycle.response_started)

    def _give_up(self, *, can_answer: bool) -> None:
        if can_answer:
            self.transport.write(_TOO_SLOW)
        self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._arm(self._limits.header_s, self._no_headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._disarm()
        self._is_read()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to wait for headers."""
        self._arm(self._limits.header_s, self._no_headers)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Begin to wait for the body."""
        self._arm(self._limits.body_s, self._no_body)
        super().on_headers_complete()
        if self.cycle is not None:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope["extensions"] = {WRITE: partial(_write, weakref.ref(self.cycle))}

    def on_message_complete(self) -> None:
        """Wait no more: the rest is up to the app."""
        self._disarm()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._disarm()
        self.transport.write(_raw_error("400 Bad Request", msg))
        self.transport.close()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        # Closing would wait for it to read all the rest.
        self._unread = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Wait no more: it reads."""
        self._is_read()
        super().resume_writing()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
