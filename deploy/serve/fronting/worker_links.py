"""The front's end of the connections to workers: sends requests, and sorts what comes of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

from offramp.deploy.http.backend import WorkerLostError
from offramp.deploy.serve.fronting.wire_messages import (
    ACCEPTED,
    LEAVING,
    MOST_BYTES,
    Asked,
    Inflow,
    WireAddress,
    asking,
    error_of,
    framed,
)

_logger = logging.getLogger(__name__)

Part = TypeVar("Part")

GREETING_BYTES = 1024
"""No first message is longer."""

SILENCE_S = 4.0
"""A worker that says nothing for so long, not even that it lives, is given up."""

SLICES = 8
"""The wait is cut into so many: a front that had no time to listen for long counts it as one."""


class SilentWorkerError(WorkerLostError):
    """A worker says nothing any more; a request did not kill it."""


class Arriving(Generic[Part]):
    """What comes of one request, on its way from the wire to the route that answers.

    Args:
        unfinished: Completions, or texts, that are to end.
        unpack: Makes a token, or what became of a text, from what came over the wire.
        is_last: Says whether that ends one.
        pass_on: Takes what came while it is waited for, and says whether it did; never what ends
            the request.

    Attributes:
        unfinished: As given, and then counted down.
        number: Names the request on the wire, once it is asked.
    """

    number = -1

    def __init__(
        self,
        unfinished: int,
        unpack: Callable[[Sequence[Any]], Part],
        is_last: Callable[[Part], bool],
        pass_on: Callable[[list[tuple[int, Part]]], bool] = lambda _: False,
    ) -> None:
        self.unfinished = unfinished
        self._pass_on = pass_on
        self._unpack = unpack
        self._is_last = is_last
        self._came: list[tuple[int, Part]] = []
        self._is_accepted = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def add(self, place: int, fields: Sequence[Any]) -> None:
        """Take what came; ``wake`` when all is there that came with it."""
        if place >= 0:
            part = self._unpack(fields)
            self.unfinished -= self._is_last(part)
            self._came.append((place, part))
        elif place == ACCEPTED:
            self._is_accepted = True
        else:
            self._error = self._error or error_of(*fields)

    def fail(self, error: Exception) -> None:
        """Hand on an error once all else is; of several the first."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Hand on what is there."""
        if self._waiter is not None and not self._waiter.done() and not self._has_passed_on():
            self._waiter.set_result(None)

    def _has_passed_on(self) -> bool:
        if self._error is not None or not (self.unfinished and self._came):
            return False
        came, self._came = self._came, []
        try:
            if self._pass_on(came):
                return True
            self._came = came
        except Exception as error:  # whoever waits is told of it: others share the connection
            self._error = error
        return False

    @property
    def is_over(self) -> bool:
        """Whether all has been taken."""
        return not (self.unfinished or self._came)

    async def take(self) -> list[tuple[int, Part]]:
        """Wait for what comes next, with the indices of completions or texts.

        Returns:
            Nothing if the request was accepted, else at least one.

        Raises:
            Exception: what ended it.
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


class WorkerLinks:
    """All workers' connections."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(32)
        self._numbers = itertools.count()
        self._links: dict[str, _Link] = {}
        self._servers: list[asyncio.Server] = []  # uvloop's end with the last reference to them
        self._watching: asyncio.Task[None] | None = None

    async def listen(self, host: str) -> WireAddress:
        """Begin to listen, at any port of an address, and for this machine's own at a socket."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Link(self), host, 0)
        self._servers = [server]
        local = ""
        if sys.platform == "linux":  # whose sockets may have a name that is no file's
            local = f"\0offramp-{secrets.token_hex(16)}"
            self._servers.append(await loop.create_unix_server(lambda: _Link(self), local))
        self._watching = asyncio.create_task(self._watch())
        return WireAddress(host, server.sockets[0].getsockname()[1], self._secret, local)

    def reached(self) -> set[str]:
        """Workers that are connected, not silent, and not about to end."""
        return {name for name, link in self._links.items() if link.takes_more}

    def ask(self, worker: str, asked: Asked, arriving: Arriving[Any]) -> None:
        """Send a request to one of those that are ``reached``; ``hang_up`` in any case."""
        arriving.number = next(self._numbers)
        self._links[worker].begin(arriving, asked)

    def hang_up(self, worker: str, arriving: Arriving[Any]) -> None:
        """Drop whatever comes from now on, and have the worker stop unless it has ended."""
        if worker in self._links:
            self._links[worker].end(arriving)

    def greet(self, message: list[Any], link: _Link) -> str | None:
        """The name of the worker that a first message is from; None if it is not of this pool."""
        secret, worker = message
        if not secrets.compare_digest(str(secret), self._secret):
            return None
        self._links[str(worker)] = link
        return str(worker)

    def lose(self, worker: str, link: _Link) -> None:
        """Forget a worker whose connection has broken, unless it has a newer one."""
        if self._links.get(worker) is link:
            del self._links[worker]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SILENCE_S / SLICES)
            for link in list(self._links.values()):
                link.look()


class _Link(asyncio.Protocol):
    """One worker's connection."""

    def __init__(self, links: WorkerLinks) -> None:
        self._silent = 0  # looks since it was heard last
        self._is_leaving = False
        self._links = links
        self._worker: str | None = None
        self._arriving: dict[int, Arriving[Any]] = {}
        self._inflow = Inflow(GREETING_BYTES)
        self._transport: asyncio.Transport | None = None

    @property
    def takes_more(self) -> bool:
        """Whether it can be sent requests."""
        return self._silent < SLICES and not self._is_leaving

    def begin(self, arriving: Arriving[Any], asked: Asked) -> None:
        """Send a request."""
        self._send(asking(arriving.number, asked))
        self._arriving[arriving.number] = arriving

    def end(self, arriving: Arriving[Any]) -> None:
        """Forget a request, and have the worker give it up unless it has ended."""
        if self._arriving.pop(arriving.number, None) is not None and arriving.unfinished:
            self._send([arriving.number])

    def look(self) -> None:
        """End its requests once it has been silent for too long."""
        self._silent += 1
        if self._silent == SLICES:
            self._fail(SilentWorkerError("the request's worker no longer answers"))

    def _send(self, message: list[Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own are none by class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._silent = 0
        try:
            for message in self._inflow.messages(data):
                self._hear(message)
        except (ValueError, TypeError):
            self._refuse()

    def _hear(self, message: Any) -> None:
        if self._worker is None:
            self._worker = self._links.greet(message, self)
            if self._worker is None:
                raise ValueError("it is of no worker of this pool")
            self._inflow.most_bytes = MOST_BYTES
            return
        woken = {}
        for number, place, *fields in message:
            arriving = self._arriving.get(number)
            if arriving is not None:
                arriving.add(place, fields)
                woken[number] = arriving
            elif place == LEAVING:
                self._is_leaving = True
        for arriving in woken.values():
            arriving.wake()

    def _refuse(self) -> None:
        _logger.warning("what came over the wire is not from a worker of this pool")
        if self._transport is not None:
            self._transport.abort()

    def _fail(self, error: Exception) -> None:
        for arriving in self._arriving.values():
            arriving.fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._worker is not None:
            self._links.lose(self._worker, self)
        self._fail(WorkerLostError("the request's worker was lost"))
