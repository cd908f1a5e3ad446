"""Passes tokens on and does nothing else: what a front in Python hardly saves.

Run by itself, it says at which port it listens. The first connections are the clients'; what comes
over another is a worker's: messages of tokens, as workers send them, of which each is written to
its client's connection as a chunk of OpenAI's. ``relay_cpu_s`` runs one and measures it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any, ClassVar

import psutil
import uvloop

STEPS = 3000
"""Messages that are measured."""

WARM_STEPS = 100
"""Messages before them."""

CHUNK: dict[str, Any] = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1_800_000_000,
    "model": "reference",
    "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
}


class Relay(asyncio.Protocol):
    """One connection, of a client or of the worker."""

    everyone: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who came."""
        self.everyone.append(transport)

    def data_received(self, data: bytes) -> None:
        """Pass on the tokens of every message that is whole."""
        self._data += data
        while len(self._data) >= (end := 4 + int.from_bytes(self._data[:4])):
            tokens = json.loads(bytes(self._data[4:end]))
            del self._data[:end]
            for _, place, *_ in tokens:
                body = f"data: {json.dumps(CHUNK)}\n\n".encode()
                self.everyone[place].write(b"%x\r\n%b\r\n" % (len(body), body))


async def relay_cpu_s(streams: int, step_s: float) -> float:
    """Processor seconds of a relay for each token.

    Args:
        streams: Clients, each of which gets a token of each message.
        step_s: Seconds between two messages.
    """
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            return await _measured(process.pid, int(process.stdout.readline()), streams, step_s)
        finally:
            process.terminate()


async def _measured(pid: int, port: int, streams: int, step_s: float) -> float:
    clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(streams)]
    reading = [asyncio.ensure_future(reader.read()) for reader, _ in clients]
    _, worker = await asyncio.open_connection("127.0.0.1", port)
    message = json.dumps([[1, place, 7, " token", 12, 0, None, 40] for place in range(streams)])
    relay = psutil.Process(pid)
    before_s = 0.0
    for number in range(WARM_STEPS + STEPS):
        if number == WARM_STEPS:
            before_s = float(sum(relay.cpu_times()[:2]))
        worker.write(len(message).to_bytes(4) + message.encode())
        await asyncio.sleep(step_s)
    spent_s = float(sum(relay.cpu_times()[:2])) - before_s
    for each in reading:
        each.cancel()
    for writer in (worker, *(each for _, each in clients)):
        writer.close()
    return spent_s / (STEPS * streams)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Relay, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
