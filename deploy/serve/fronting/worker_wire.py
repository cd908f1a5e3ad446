"""A worker's end of the connection to its front: requests come in, and what becomes of them goes.

It is a connection per worker and a message per engine step, of all requests together: through Ray,
a call per request and an item per token would cost more than many a token takes to make.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from offramp.controller.errors import OfframpError, OverloadedError, RequestError
from offramp.deploy.http.observability.access_log import REQUEST_NAME
from offramp.deploy.serve.fronting.wire_messages import (
    ACCEPTED,
    LEAVING,
    Asked,
    Inflow,
    WireAddress,
    asked_of,
    failed,
    framed,
)

_logger = logging.getLogger(__name__)

CONNECT_S = 1.0
"""Longest wait for a connection: a worker that makes one is asked meanwhile how it is."""

UNREAD_S = 30.0
"""A front that takes nothing for so long is given up."""

BEAT_S = 1.0
"""The front is told so often that its worker lives and makes progress."""

SEND_BYTES = 2**22
"""Room for what is sent and not read yet."""

_READ_BYTES = 2**16

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group at the other end of a socket of this machine."""


class Call:
    """A request that the front sent, until it is answered or given up.

    Attributes:
        number: Names it on the wire.
        asked: What is asked.
    """

    def __init__(self, wire: WorkerWire, number: int, asked: Asked) -> None:
        self.number = number
        self.asked = asked
        self._give_up: Callable[[], object] = lambda: None
        self._wire = wire
        self._unfinished = asked.completions

    def stop_by(self, give_up: Callable[[], object]) -> None:
        """Say what stops the work on it; it may be over by now."""
        self._give_up = give_up
        if self.number not in self._wire.calls:
            give_up()

    def give_up(self) -> None:
        """Stop the work on it."""
        self._give_up()

    def accept(self) -> None:
        """Have the front told that it will be answered."""
        self._wire.add([self.number, ACCEPTED])

    def answer(self, entry: list[Any], *, is_last: bool) -> None:
        """Have a part of the answer sent with the next message.

        Args:
            entry: It, as it goes over the wire.
            is_last: Whether it ends its completion, or is all of a text.
        """
        self._wire.add(entry)
        self._unfinished -= is_last
        if not self._unfinished:
            self._wire.calls.pop(self.number, None)

    def fail(self, error: BaseException) -> None:
        """Give it up, and have the front told why; of several errors the first counts."""
        if self._wire.calls.pop(self.number, None) is None:
            return
        if not isinstance(error, RequestError | OverloadedError):
            name = REQUEST_NAME.set(self.asked.request_id)
            foreign = None if isinstance(error, OfframpError) else error
            _logger.error("%s: %r", error, error.__cause__ or error, exc_info=foreign)
            REQUEST_NAME.reset(name)
        self._give_up()
        self._wire.add(failed(self.number, error))

    def flush(self) -> None:
        """Send what waits, of this request and all others."""
        self._wire.flush()


class WorkerWire:
    """Has a thread of its own for what comes; whoever works on requests sends.

    Args:
        address: The front's.
        worker: Name of the worker.
        begin: Begins to work on a request, in that thread, and returns at once.
        is_healthy: Says whether the worker makes progress; the front is told while it does.

    Attributes:
        calls: Requests under way, by their numbers.
    """

    def __init__(
        self,
        address: WireAddress,
        worker: str,
        begin: Callable[[Call], object],
        is_healthy: Callable[[], bool],
    ) -> None:
        self.address = address
        self.is_broken = False
        self.calls: dict[int, Call] = {}
        self._begin = begin
        self._is_healthy = is_healthy
        self._waiting: deque[list[Any]] = deque()
        self._sending = threading.Lock()
        self._socket = _connected(address)
        self._send([address.secret, worker])
        threading.Thread(target=self._listen, name="offramp-wire", daemon=True).start()

    def add(self, entry: list[Any]) -> None:
        """Have something sent with the next message."""
        self._waiting.append(entry)

    def flush(self, *, beats: bool = False) -> None:
        """Send what waits, from any thread; as a sign of life even if that is nothing."""
        with self._sending:
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if waiting or beats:
                self._send(waiting)

    @property
    def is_busy(self) -> bool:
        """Whether a request is under way, or something waits to be sent."""
        return bool(self.calls or self._waiting)

    def leave(self) -> None:
        """Have the front send no more requests."""
        self.add([-1, LEAVING])
        self.flush()

    def close(self) -> None:
        """End the connection, and whatever waits to be sent, from any thread."""
        self.is_broken = True
        with contextlib.suppress(OSError):  # it is broken anyway
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, message: list[Any]) -> None:
        if self.is_broken:
            return
        try:
            self._socket.sendall(framed(message))
        except OSError as error:
            # What it carried is lost; the worker looks for a front once it is asked how it is.
            _logger.error("the front takes nothing any more: %r", error)
            self.close()

    def _listen(self) -> None:
        inflow, ready = Inflow(), select.poll()
        try:
            ready.register(self._socket, select.POLLIN)
            next_s = time.monotonic()
            while not self.is_broken:
                if ready.poll(BEAT_S * 1e3):
                    data = self._socket.recv(_READ_BYTES)
                    if not data:
                        return
                    for message in inflow.messages(data):
                        self._hear(*message)
                if time.monotonic() >= next_s and self._is_healthy():
                    next_s = time.monotonic() + BEAT_S
                    self.flush(beats=True)
        except (OSError, ValueError, TypeError) as error:
            if not self.is_broken:
                _logger.error("what came from the front cannot be read: %r", error)
        finally:
            self.close()
            for number in list(self.calls):
                self._hear(number)

    def _hear(self, number: int, *asked: Any) -> None:
        if not asked:
            if (given_up := self.calls.pop(number, None)) is not None:
                given_up.give_up()
            return
        try:
            call = self.calls[number] = Call(self, number, asked_of(*asked))
            self._begin(call)
        except Exception as error:  # one that cannot be read, or begun, must not end all others
            self.calls.pop(number, None)
            if not isinstance(error, RequestError | OverloadedError):
                _logger.exception("a request could not be begun")
            self.add(failed(number, error))
            self.flush()


def _connected(address: WireAddress) -> socket.socket:
    """A connection to a front, which gives up sending where nothing is read for ``UNREAD_S``."""
    found = _connected_here(address.local) if address.local else None
    if found is None:
        found = socket.create_connection((address.host, address.port), CONNECT_S)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The system's own timeout: for Python's it is asked before each sending whether one may.
    found.settimeout(None)
    limit = struct.pack("ll", int(UNREAD_S), round(UNREAD_S % 1 * 1e6))
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    # A front that has no time for a moment holds up no step; the system gives what it may.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    return found


def _connected_here(name: str) -> socket.socket | None:
    """A connection to a front of this machine, or of its container; None if it is another's.

    Whoever else has taken the name, of those who may read it, is told no secret.
    """
    found = socket.socket(socket.AF_UNIX)
    try:
        found.settimeout(CONNECT_S)
        found.connect(name)
        said = found.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, user, _ = _CREDENTIALS.unpack(said)
    except OSError:
        user = None
    if user != os.getuid():
        found.close()
        return None
    return found
