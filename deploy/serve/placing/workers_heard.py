"""When each worker was heard of last, for whoever is about to send it something, or waits for it.

A module of its own, as Ray carries ``WorkerRouter`` into the front by value, with copies of what
its module holds; modules that it names are imported there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from typing import TypeVar

from offramp.deploy.http.backend import WorkerLostError

AWAKE_S = 1.5
"""A worker that has reported so recently is not asked first whether it answers. They report each
second; one that froze after its last report is found out by its silence."""

FORGET_S = 60.0
"""Nothing is kept of workers that have not reported for so long: they are gone."""

LOOK_S = 0.5
"""Seconds between two looks whether a worker that is waited for still reports."""

Answer = TypeVar("Answer")


class WorkersHeard:
    """Notes reports, in the front's event loop; routers read them in their own thread."""

    def __init__(self) -> None:
        self._heard_s: dict[str, float] = {}

    def note(self, replica: str) -> None:
        """Note that a worker has reported."""
        now_s = time.monotonic()
        self._heard_s[replica] = now_s
        for each, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > FORGET_S:
                del self._heard_s[each]

    def knows(self, replica: str) -> bool:
        """Whether a worker has reported lately."""
        return replica in self._heard_s

    def silent_s(self, replica: str) -> float:
        """Seconds since a worker has reported; endless if it never has, or not for long."""
        return time.monotonic() - self._heard_s.get(replica, float("-inf"))

    def awake(self, replicas: Iterable[str]) -> set[str]:
        """Those that have reported within ``AWAKE_S``: routers send to them at once."""
        return {each for each in replicas if self.silent_s(each) < AWAKE_S}

    async def answered(
        self, replica: str | None, answer: Awaitable[Answer], silence_s: float
    ) -> Answer:
        """Wait for a worker's answer for as long as it reports.

        Args:
            replica: The worker, awake when it was asked: a router may have sent what one that was
                not was to get to another. None: whoever it is, it is waited for.
            answer: Is cancelled if the worker falls silent.
            silence_s: Seconds without a report after which it has.

        Raises:
            WorkerLostError: it has fallen silent.
        """
        answering = asyncio.ensure_future(answer)
        try:
            while not (await asyncio.wait({answering}, timeout=LOOK_S))[0]:
                if replica is not None and self.silent_s(replica) > silence_s:
                    raise WorkerLostError("the request's worker no longer answers")
            return answering.result()
        finally:
            answering.cancel()


HEARD = WorkersHeard()
"""Of this process: the front's backends note, and its routers read."""
