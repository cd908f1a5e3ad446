"""A strict client: it counts a stream as good only if all of it came, and its end as promised.

It speaks HTTP by itself and reads events only once their stream has ended: what it costs is not to
be mistaken for what the server costs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

PATIENCE_S = 180.0
"""A reply that is not whole by then counts as lost."""

READ_BYTES = 2**16


@dataclass(eq=False)
class Streamed:
    """What one request brought.

    Attributes:
        wanted: Tokens that it asked for.
        status: The reply's; 0: there was none.
        sent_s: When it was sent; by ``time.perf_counter``, as all times here.
        told_s: When the status came.
        token_s: When each token came.
        finish: The finish reason of its last token.
        error: The error that it ended with, or that came in its place.
        is_done: Whether ``[DONE]`` came, and nothing after it.
        ended_s: When the connection's reply was whole, or broke off.
    """

    wanted: int
    status: int = 0
    sent_s: float = 0.0
    told_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    finish: str | None = None
    error: Any = None
    is_done: bool = False
    ended_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    _came: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Every token came, with the right end."""
        return (
            self.status == 200
            and len(self.token_s) == self.wanted
            and self.finish == "length"
            and self.is_done
            and self.error is None
        )

    @property
    def is_refused(self) -> bool:
        """It was told to come back, in the contract's own words."""
        return (
            self.status in (429, 503) and "retry-after" in self.headers and self.error is not None
        )

    @property
    def is_told(self) -> bool:
        """It failed, and the client was told so, before the end or in place of it."""
        is_error = self.error is not None and self.finish is None
        return is_error and (self.is_done or self.status != 200)

    @property
    def end(self) -> str:
        """What became of it, in words."""
        if self.is_good:
            return "whole"
        if self.is_refused:
            return "told to come back"
        return "told of a failure" if self.is_told else "not accounted for"

    @property
    def has_begun(self) -> bool:
        """Whether something of its body came."""
        return bool(self._came)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [
            after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)
        ]

    def take(self, data: bytes) -> None:
        """Keep some bytes of the body, to be read at the end."""
        self._came.append((time.perf_counter(), data))

    def conclude(self) -> None:
        """Read what came."""
        self.ended_s = time.perf_counter()
        if self.status != 200:
            with suppress(ValueError):
                self.error = json.loads(b"".join(data for _, data in self._came))["error"]
            return
        rest = b""
        for came_s, data in self._came:
            *events, rest = (rest + data.replace(b"\r\n", b"\n")).split(b"\n\n")
            for event in events:
                self._note(event, came_s)
        self._came.clear()

    def _note(self, event: bytes, came_s: float) -> None:
        if not event.startswith(b"data: "):
            return
        if event == b"data: [DONE]":
            self.is_done = True
            return
        self.is_done = False
        said = json.loads(event[6:])
        self.error = said.get("error", self.error)
        for choice in said.get("choices") or ():
            self.finish = choice.get("finish_reason") or self.finish
            if _has_text(choice):
                self.token_s.append(came_s)


def _has_text(choice: dict[str, Any]) -> bool:
    # Whether a token has readable text is not asked: some have none, and count.
    said = choice.get("delta", choice)
    return bool(said.get("content") or "text" in said)


def asked(prompt: list[int], tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a streamed greedy completion of exactly so many tokens."""
    body = {"model": "reference", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return {**body, "temperature": 0, "stream": True, **fields}


@dataclass(frozen=True)
class StrictClient:
    """Sends requests to one server on this machine.

    Attributes:
        port: The server's.
        path: Route of its completions.
    """

    port: int
    path: str = "/v1/completions"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)

    def head(self, length: int, method: str = "POST", path: str = "") -> bytes:
        """What comes before a body."""
        return (
            f"{method} {path or self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            f"content-type: application/json\r\nconnection: close\r\n"
            f"content-length: {length}\r\n\r\n"
        ).encode()

    async def stream(self, body: dict[str, Any]) -> Streamed:
        """Send a request over a connection of its own and follow it to its end."""
        streamed = Streamed(body["max_tokens"])
        with suppress(OSError):
            await self.follow(streamed, body, *await self.connect())
        return streamed

    async def follow(
        self,
        streamed: Streamed,
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send a request over a connection that is there."""
        content = json.dumps(body).encode()
        streamed.sent_s = time.perf_counter()
        writer.write(self.head(len(content)) + content)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await receive(reader, streamed)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError, IndexError):
            pass  # broken off: the stream is judged by what came
        finally:
            writer.close()
            streamed.conclude()

    async def get(self, path: str) -> Any:
        """The JSON of a GET."""
        return json.loads(await self.text(path))

    async def text(self, path: str) -> str:
        """The body of a GET."""
        reader, writer = await self.connect()
        writer.write(self.head(0, "GET", path))
        streamed = Streamed(0)
        await receive(reader, streamed)
        writer.close()
        return b"".join(data for _, data in streamed._came).decode()


async def receive(reader: asyncio.StreamReader, streamed: Streamed) -> None:
    """Read a reply."""
    line = await reader.readline()
    streamed.told_s = time.perf_counter()
    streamed.status = int(line.split()[1])
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin1").partition(":")
        streamed.headers[name.strip().lower()] = value.strip()
    if "content-length" in streamed.headers:
        streamed.take(await reader.readexactly(int(streamed.headers["content-length"])))
    elif streamed.headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            streamed.take((await reader.readexactly(size + 2))[:-2])
    else:
        while data := await reader.read(READ_BYTES):
            streamed.take(data)


async def closed_loop(
    client: StrictClient, bodies: list[dict[str, Any]], together: int
) -> list[Streamed]:
    """All requests, so many at a time."""
    waiting, found = list(reversed(bodies)), []

    async def one_after_another() -> None:
        while waiting:
            found.append(await client.stream(waiting.pop()))

    await asyncio.gather(*(one_after_another() for _ in range(together)))
    return found


async def open_loop(
    send: Callable[[int], Awaitable[Streamed]], rate: float, seconds: float
) -> list[Streamed]:
    """Requests at a steady rate, however long the answers take; returns once all are answered."""
    began_s = time.perf_counter()
    tasks = []
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began_s + number / rate - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(number)))
    return list(await asyncio.gather(*tasks))
