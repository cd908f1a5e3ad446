"""Takes the tokens that workers send, and sorts them by request."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import secrets
from collections.abc import Sequence
from typing import Any, cast

from offramp.deploy.http.backend import Tokens, WorkerLostError
from offramp.deploy.serve.fronting.token_wire import LENGTH_BYTES, MOST_BYTES, WireAddress, unpacked
from offramp.worker.decoding.request import TokenEvent

_logger = logging.getLogger(__name__)

GREETING_BYTES = 1024
"""No first message is longer."""


class Arriving:
    """Tokens of one request on their way from the wire to the route that answers.

    Args:
        number: Names the request on the wire.
        name: Names it to its client.
    """

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.worker: str | None = None
        self.tokens = 0
        self._came: Tokens = []
        self._is_accepted = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def accept(self, worker: str) -> None:
        """Note that a worker has taken the request: the first that is handed on is no token."""
        self.worker, self._is_accepted = worker, True
        self.wake()

    def add(self, place: int, event: TokenEvent) -> None:
        """Take a token; ``wake`` when all are there that came with it."""
        self.tokens += 1
        self._came.append((place, event))

    def fail(self, error: Exception) -> None:
        """Hand on an error once all tokens are; of several the first."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Hand on what is there."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Tokens:
        """Wait for what comes next: no token if the request was accepted, else at least one.

        Raises:
            Exception: what ``fail`` was told.
        """
        while True:
            if self._is_accepted:
                self._is_accepted = False
                return []
            if self._came:
                came, self._came = self._came, []
                return came
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class TokenInbox:
    """The front's end: sorts what all workers send by request."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(32)
        self._numbers = itertools.count()
        self._arriving: dict[int, Arriving] = {}
        self._links: dict[str, _Link] = {}

    async def listen(self, host: str) -> WireAddress:
        """Begin to listen, at any port of an address."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Link(self), host, 0)
        return WireAddress(host, server.sockets[0].getsockname()[1], self._secret)

    def expect(self, name: str) -> Arriving:
        """Make a place for what is sent of a request."""
        arriving = Arriving(next(self._numbers), name)
        self._arriving[arriving.number] = arriving
        return arriving

    def forget(self, arriving: Arriving) -> None:
        """Drop whatever comes from now on."""
        self._arriving.pop(arriving.number, None)

    def greet(self, message: list[Any], link: _Link) -> str | None:
        """The name of the worker that a first message is from; None if it is not of this pool."""
        secret, worker = message
        if not secrets.compare_digest(str(secret), self._secret):
            return None
        self._links[str(worker)] = link
        return str(worker)

    def take(self, message: Sequence[Sequence[Any]]) -> None:
        """Hand out a worker's tokens."""
        woken = {}
        for number, place, *fields in message:
            arriving = self._arriving.get(number)
            if arriving is not None:
                arriving.add(place, unpacked(arriving.name, fields))
                woken[number] = arriving
        for arriving in woken.values():
            arriving.wake()

    def lose(self, worker: str, link: _Link) -> None:
        """End the requests of a worker whose connection has broken, unless it has a newer one."""
        if self._links.get(worker) is not link:
            return
        del self._links[worker]
        for arriving in self._arriving.values():
            if arriving.worker == worker:
                arriving.fail(WorkerLostError("the request's worker was lost"))


class _Link(asyncio.Protocol):
    """One worker's connection."""

    def __init__(self, inbox: TokenInbox) -> None:
        self._inbox = inbox
        self._worker: str | None = None
        self._data = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own are none by class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while len(self._data) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._data[:LENGTH_BYTES])
            if end > (GREETING_BYTES if self._worker is None else MOST_BYTES):
                self._refuse()
                return
            if len(self._data) < end:
                return
            body = bytes(self._data[LENGTH_BYTES:end])
            del self._data[:end]
            try:
                self._hear(json.loads(body))
            except (ValueError, TypeError):
                self._refuse()
                return

    def _hear(self, message: Any) -> None:
        if self._worker is not None:
            self._inbox.take(message)
            return
        self._worker = self._inbox.greet(message, self)
        if self._worker is None:
            self._refuse()

    def _refuse(self) -> None:
        _logger.warning("what came over the wire is not from a worker of this pool")
        self._data.clear()
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._worker is not None:
            self._inbox.lose(self._worker, self)
