"""Carries tokens from workers to the front: a connection per worker, a message per engine step.

Ray carries what is said once a request; as a channel for tokens it would cost more than to make
them. A message is its length, 4 bytes with the highest first, and JSON: nothing is unpickled. The
first names the worker and shows the pool's secret; nothing else is read before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from offramp.controller.costs.readings import EnergyMethod, EnergyShare
from offramp.worker.decoding.request import CompletionStats, TokenEvent
from offramp.worker.decoding.sampler import Draw

_logger = logging.getLogger(__name__)

LENGTH_BYTES = 4
MOST_BYTES = 2**28
"""No message is longer."""

CONNECT_S = 1.0
"""Longest wait for a connection: a worker that makes one is asked meanwhile how it is."""

UNREAD_S = 30.0
"""A front that takes nothing for so long is given up."""

_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class WireAddress:
    """Where a front takes tokens.

    Attributes:
        host, port: Where it listens.
        secret: Shows that a worker belongs to its pool.
    """

    host: str
    port: int
    secret: str


class TokenWire:
    """A worker's end; its engine's thread sends, and another may close it.

    Args:
        address: The front's.
        worker: Name of the worker.
    """

    def __init__(self, address: WireAddress, worker: str) -> None:
        self.address = address
        self.is_broken = False
        self._waiting: list[list[Any]] = []
        self._socket = socket.create_connection((address.host, address.port), CONNECT_S)
        self._socket.settimeout(UNREAD_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send([address.secret, worker])

    def add(self, number: int, place: int, event: TokenEvent) -> None:
        """Have a token sent with the next message.

        Args:
            number: The request's, as the front counts.
            place: Index of its choice.
            event: The token.
        """
        self._waiting.append(packed(number, place, event))

    def flush(self) -> None:
        """Send what waits."""
        if self._waiting and not self.is_broken:
            try:
                self._send(self._waiting)
            except OSError as error:
                # Its tokens are lost; the worker looks for a front once it is asked how it is.
                _logger.error("the front takes no tokens any more: %r", error)
                self.is_broken = True
        self._waiting.clear()

    def close(self) -> None:
        """End the connection, and whatever waits to be sent, from any thread."""
        self.is_broken = True
        with contextlib.suppress(OSError):  # it is broken anyway
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _send(self, message: list[Any]) -> None:
        body = _encode(message).encode()
        self._socket.sendall(len(body).to_bytes(LENGTH_BYTES) + body)


def packed(number: int, place: int, event: TokenEvent) -> list[Any]:
    """A token as it goes over the wire: in few words if it is one like most."""
    fields = [
        number,
        place,
        event.token,
        event.text,
        event.exit_layer,
        event.generation,
        event.finish_reason,
        event.text_offset,
    ]
    if event.logprob is not None or event.top_logprobs or event.stats or event.prompt_draws:
        fields += [
            event.logprob,
            event.top_logprobs,
            event.stats and astuple(event.stats),
            [(draw.token, draw.logprob, draw.top) for draw in event.prompt_draws],
        ]
    return fields


def unpacked(name: str, fields: Sequence[Any]) -> TokenEvent:
    """The token of a request, from what comes after its choice's index."""
    token, text, exit_layer, generation, reason, offset, *rare = fields
    if not rare:
        return TokenEvent(name, token, text, exit_layer, generation, reason, text_offset=offset)
    logprob, top, stats, draws = rare
    return TokenEvent(
        name,
        token,
        text,
        exit_layer,
        generation,
        reason,
        logprob,
        _pairs(top),
        offset,
        stats and _stats(stats),
        tuple(Draw(each, chance, _pairs(best)) for each, chance, best in draws),
    )


def _pairs(top: Sequence[Sequence[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in top)


_STATS = tuple(CompletionStats.__dataclass_fields__)


def _stats(values: Sequence[Any]) -> CompletionStats:
    fields = dict(zip(_STATS, values, strict=True))
    if (energy := fields["energy"]) is not None:
        joules, method, *rest = energy
        fields["energy"] = EnergyShare(joules, EnergyMethod(method), *rest)
    return CompletionStats(**fields)
