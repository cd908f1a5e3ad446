"""A worker's end of the connection to a front, without a model behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from offramp.controller.errors import RequestError
from offramp.deploy.serve.fronting.wire_messages import WireAddress
from offramp.deploy.serve.fronting.worker_links import WorkerLinks
from offramp.deploy.serve.fronting.worker_wire import Call, WorkerWire

PATIENCE_S = 20.0


class WireWorker:
    """A worker's end, and what it was asked."""

    def __init__(self, address: WireAddress, name: str = "worker-0") -> None:
        self.is_healthy = True
        self.calls: list[Call] = []
        self.given_up: list[int] = []
        self._came = threading.Condition()
        self.wire = WorkerWire(address, name, self._begin, lambda: self.is_healthy)

    def _begin(self, call: Call) -> None:
        call.stop_by(lambda: self._note(self.given_up, call.number))
        if call.asked.request_id == "refused":
            raise RequestError("n", "is odd", "Ask for more")
        self._note(self.calls, call)

    def _note(self, notes: list[Any], what: Any) -> None:
        with self._came:
            notes.append(what)
            self._came.notify()

    async def has(self, notes: list[Any], count: int = 1) -> None:
        def wait() -> bool:
            with self._came:
                return self._came.wait_for(lambda: len(notes) >= count, PATIENCE_S)

        assert await asyncio.to_thread(wait)

    async def call(self) -> Call:
        """The request that came last."""
        await self.has(self.calls)
        return self.calls[-1]


def run(scenario: Callable[[WorkerLinks, WireAddress], Awaitable[Any]]) -> Any:
    """In the loop that fronts have."""

    async def within() -> Any:
        links = WorkerLinks()
        address = await links.listen("127.0.0.1")
        return await asyncio.wait_for(scenario(links, address), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(within())


async def connected(links: WorkerLinks, address: WireAddress, name: str = "worker-0") -> WireWorker:
    worker = await asyncio.to_thread(WireWorker, address, name)
    while name not in links.reached():
        await asyncio.sleep(0.01)
    return worker
