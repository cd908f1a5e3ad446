"""Workers that are killed, frozen or told to stop under twelve streams, and then the pool."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import suppress

import psutil
from serving.serve_rows import ServeRow, row
from serving.served_process import STOPPED_IN_S, ServerProcess, await_line
from serving.steady_state import prompts
from serving.stream_client import Streamed, asked

STREAMS = 12
TOKENS = 400
REPLACED_IN_S = 120.0

FORGOTTEN_S = 11.0
"""By then the front counts on no worker that has said nothing since it was lost."""

KINDS = ("whole", "told of a failure", "not accounted for")
"""What may become of a stream."""

SIGNALS = {
    "a worker killed": signal.SIGKILL,
    "a worker frozen": signal.SIGSTOP,
    "a worker told to stop": signal.SIGTERM,
}


async def lost_workers(server: ServerProcess) -> list[ServeRow]:
    """Rows of a pool of two that loses one worker after the other, is redeployed, and stopped."""
    rows = []
    for what, number in SIGNALS.items():
        await server.idle(workers=2)
        found, streaming = await _begun(server)
        victim = server.workers()[0]  # of so many streams each worker has some
        victim.send_signal(number)
        rows += [*_rows(what, found, await streaming), await _replaced(server, what, victim)]
        await asyncio.sleep(FORGOTTEN_S)
    rows += await _redeployed(server)
    await server.idle(workers=2)
    found, streaming = await _begun(server)
    server.process.send_signal(signal.SIGTERM)
    rows += _rows("the pool told to stop", found, await streaming)
    status = await asyncio.to_thread(server.process.wait, STOPPED_IN_S)
    return [*rows, row("the pool told to stop: exit status", STREAMS, status, "status")]


async def _redeployed(server: ServerProcess) -> list[ServeRow]:
    """Rows of twelve clients that go on asking until all workers were replaced, and then once."""
    await server.idle(workers=2)
    found: list[Streamed] = []
    before = {each.pid for each in server.workers()}

    async def ask_on(number: int) -> None:
        body, is_over = asked(prompts(1, seed=number)[0], TOKENS), False
        while not is_over:
            is_over = replacing.done() and not before & {each.pid for each in server.workers()}
            found.append(Streamed(TOKENS))
            await server.client.follow(found[-1], body, *await server.client.connect())

    began_s = time.monotonic()
    server.process.send_signal(signal.SIGUSR1)
    replacing = asyncio.ensure_future(asyncio.to_thread(await_line, server.process, "redeployed: "))
    await asyncio.gather(*(ask_on(number) for number in range(STREAMS)))
    said = replacing.result()
    if said.startswith("not"):
        raise RuntimeError(said)
    ends = Counter(each.end for each in found)
    return [
        *(
            row(f"a redeploy: streams {kind}", STREAMS, ends[kind], "streams", len(found))
            for kind in KINDS
        ),
        row("a redeploy: seconds", STREAMS, time.monotonic() - began_s, "s"),
    ]


async def _begun(server: ServerProcess) -> tuple[list[Streamed], asyncio.Future[float]]:
    """Streams that have all sent something, and the seconds until the last has ended."""
    found = [Streamed(TOKENS) for _ in range(STREAMS)]

    async def follow(number: int) -> None:
        body = asked(prompts(1, seed=number)[0], TOKENS)
        await server.client.follow(found[number], body, *await server.client.connect())

    async def ended() -> float:
        await asyncio.gather(*following)
        return loop.time() - began_s

    loop = asyncio.get_running_loop()
    following = [asyncio.ensure_future(follow(number)) for number in range(STREAMS)]
    while not all(each.has_begun or each.ended_s for each in found):
        await asyncio.sleep(0.01)
    began_s = loop.time()
    return found, asyncio.ensure_future(ended())


def _rows(what: str, found: list[Streamed], took_s: float) -> list[ServeRow]:
    ends = Counter(each.end for each in found)
    return [
        *(
            row(f"{what}: streams {kind}", STREAMS, ends[kind], "streams", STREAMS)
            for kind in KINDS
        ),
        row(f"{what}: the last stream has ended after", STREAMS, took_s, "s"),
    ]


async def _replaced(server: ServerProcess, what: str, victim: psutil.Process) -> ServeRow:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while loop.time() - began_s < REPLACED_IN_S and len(_serving(server, victim)) < 2:
        await asyncio.sleep(0.1)
    waited_s = loop.time() - began_s
    took_s = waited_s if waited_s < REPLACED_IN_S else float("nan")
    return row(f"{what}: after that, two workers again after", STREAMS, took_s, "s")


def _serving(server: ServerProcess, victim: psutil.Process) -> list[psutil.Process]:
    """Workers that have loaded their model; Ray names each by what it does."""
    found = []
    for each in server.workers():
        with suppress(psutil.Error):
            if each.pid != victim.pid and "__init__" not in "".join(each.cmdline()):
                found.append(each)
    return found
