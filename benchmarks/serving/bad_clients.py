"""Clients that harm others if they can: they hang up, send too much, send or read too slowly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from serving.serve_rows import ServeRow, p99, row
from serving.served_process import ServerProcess, fds
from serving.steady_state import prompts
from serving.stream_client import Streamed, asked

BESIDE = 4
"""Streams that go on meanwhile."""

SLOW = 300
REPORTED_S = 2.5
"""A worker says each second what it runs: after so long the metrics speak of now."""

LARGEST_BODY = 8 * 2**20 - 1000
"""Just within the default bound."""


async def hang_ups(server: ServerProcess, count: int) -> list[ServeRow]:
    """Rows of streams whose clients leave at a random moment."""
    await server.idle()
    draw = random.Random(0)
    await asyncio.sleep(REPORTED_S)
    before = fds(server.speakers())
    tasks = await _sum_of(server, "asyncio_tasks")

    async def leave(number: int) -> None:
        reader, writer = await server.client.connect()
        streamed = Streamed(500)
        body = asked(prompts(1, seed=number)[0], 500)
        following = asyncio.ensure_future(server.client.follow(streamed, body, reader, writer))
        await asyncio.wait({following}, timeout=draw.random() * 0.4)
        writer.transport.abort()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    for begin in range(0, count, 10):  # as many as find room
        await asyncio.gather(*(leave(number) for number in range(begin, begin + 10)))
    idle_s = await server.idle()
    await asyncio.sleep(REPORTED_S)
    kept = await _sum_of(server, "num_requests_running", "num_requests_waiting")
    more_tasks = await _sum_of(server, "asyncio_tasks") - tasks
    return [
        row("hang-ups: nothing under way after", count, idle_s, "s"),
        row("hang-ups: rows that the worker kept", count, kept, "requests"),
        row("hang-ups: file descriptors more than before", count, fds(server.speakers()) - before,
            "descriptors"),
        row("hang-ups: tasks of event loops more than before", count, more_tasks, "tasks"),
    ]  # fmt: skip


async def _sum_of(server: ServerProcess, *names: str) -> float:
    """What some metrics say, all processes together."""
    begins = tuple(f"offramp_{name}{{" for name in names)
    lines = (await server.client.text("/metrics")).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(begins))


async def disturbed(server: ServerProcess, seconds: float) -> list[ServeRow]:
    """Rows of streams beside which somebody misbehaves, each over a calm spell just before."""
    kinds = {
        "a body of 50 MB": _send(server, b"[" * 50_000_000),
        "a prompt of 20 MB": _send(server, b'{"model":"reference","prompt":"' + b"a " * 10_000_000),
        "a prompt of 8 MB, within the body's bound": _send(server, _large_prompt()),
        "300 slow clients": _slow(server, seconds),
    }
    rows = []
    for what, work in kinds.items():
        calm = await _gaps_beside(server, asyncio.sleep(seconds))
        gaps = await _gaps_beside(server, work, seconds)
        rows.append(
            row(f"inter-token p99 of 4 streams beside {what}", BESIDE, p99(gaps), "ms", p99(calm))
        )
    return rows


async def _gaps_beside(
    server: ServerProcess, work: Coroutine[Any, Any, object], at_least_s: float = 0.0
) -> list[float]:
    """Gaps of streams that go on as long as some work does."""
    await server.idle()
    working = asyncio.ensure_future(asyncio.wait_for(work, 60))
    gaps: list[float] = []
    end_s = asyncio.get_running_loop().time() + at_least_s

    async def one_after_another(seed: int) -> None:
        while not working.done() or asyncio.get_running_loop().time() < end_s:
            streamed = await server.client.stream(asked(prompts(1, seed)[0], 100))
            if not streamed.is_good:
                raise RuntimeError(f"a stream was not whole: {streamed}")
            gaps.extend(streamed.gaps_s)

    await asyncio.gather(*(one_after_another(seed) for seed in range(BESIDE)))
    await asyncio.gather(working, return_exceptions=True)
    return gaps


def _large_prompt() -> bytes:
    head, tail = b'{"model":"reference","max_tokens":5,"prompt":"', b'"}'
    return head + b"a " * ((LARGEST_BODY - len(head) - len(tail)) // 2) + tail


async def _send(server: ServerProcess, content: bytes) -> None:
    """Send a body as fast as it is taken, and wait for the answer."""
    reader, writer = await server.client.connect()
    writer.write(server.client.head(len(content)))
    with suppress(OSError):
        for begin in range(0, len(content), 2**20):
            writer.write(content[begin : begin + 2**20])
            await writer.drain()
        await reader.read()
    writer.close()


def _is_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the server has closed a connection, or broken it off."""
    return reader.at_eof() or writer.is_closing()


async def _slow(server: ServerProcess, seconds: float) -> None:
    """A third sends headers byte by byte, a third the body, and a third reads nothing."""

    async def one(number: int) -> None:
        reader, writer = await server.client.connect()
        head = server.client.head(1000)
        with suppress(OSError):
            if number % 3 == 2:
                writer.write(server.client.head(0, "GET", "/metrics") * 20)
            elif number % 3:
                writer.write(head)
            end_s = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end_s and not _is_over(reader, writer):
                writer.write(head[:1] if number % 3 == 0 else b" " if number % 3 else b"")
                await asyncio.sleep(1.0)
        writer.close()

    await asyncio.gather(*(one(number) for number in range(SLOW)))
