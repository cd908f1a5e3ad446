"""Requests that are sent at the same moment, by a client that costs next to nothing.

Four hundred coroutines of one event loop take turns: the last of them hears of its answer a quarter
of a second after it has come. Here one thread writes to all sockets, then waits for all at once.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from serving.stream_client import PATIENCE_S, READ_BYTES, Streamed, StrictClient, receive

SETTLE_S = 0.5
"""The server has so long to take the connections, before the first request."""


@dataclass
class Answer:
    """What came over one connection.

    Attributes:
        sent_s, told_s: When the request was sent, and when the first byte came back.
        data: All that came back.
    """

    sent_s: float = 0.0
    told_s: float = 0.0
    data: bytearray = field(default_factory=bytearray)


async def at_once(client: StrictClient, bodies: list[dict[str, Any]]) -> list[Streamed]:
    """Send requests at the same moment, each over a connection that is open already."""
    contents = [json.dumps(body).encode() for body in bodies]
    requests = [client.head(len(content)) + content for content in contents]
    answers = await asyncio.to_thread(_exchange, client.port, requests)
    return [
        await _read(answer, body["max_tokens"])
        for answer, body in zip(answers, bodies, strict=True)
    ]


def _exchange(port: int, requests: list[bytes]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in requests
        ]
        for connection, answer in zip(connections, answers, strict=True):
            selector.register(connection, selectors.EVENT_READ, answer)
        time.sleep(SETTLE_S)
        # All are sent before anything is read, in some milliseconds, which an early answer waits.
        for connection, answer, request in zip(connections, answers, requests, strict=True):
            answer.sent_s = time.perf_counter()
            with suppress(OSError):  # then nothing comes back, which is counted
                connection.sendall(request)
        end_s = time.perf_counter() + PATIENCE_S
        while selector.get_map() and time.perf_counter() < end_s:
            for key, _ in selector.select(1.0):
                _take(key, selector)
    return answers


def _take(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """Take what has come over a connection, up to its end."""
    came = b""
    with suppress(OSError):
        came = key.fileobj.recv(READ_BYTES)  # type: ignore[union-attr]  # a socket
    key.data.told_s = key.data.told_s or time.perf_counter()
    key.data.data += came
    if not came:
        selector.unregister(key.fileobj)


async def _read(answer: Answer, wanted: int) -> Streamed:
    """What an answer says; of its times, only when it was sent and told are those it came at."""
    streamed, reader = Streamed(wanted), asyncio.StreamReader()
    reader.feed_data(bytes(answer.data))
    reader.feed_eof()
    with suppress(asyncio.IncompleteReadError, ValueError, IndexError):  # judged by what came
        await receive(reader, streamed)
    streamed.conclude()
    streamed.sent_s, streamed.told_s = answer.sent_s, answer.told_s
    return streamed
