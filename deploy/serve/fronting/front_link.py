"""A worker's way to its pool's front, and to the next one if that is lost."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from offramp.deploy.serve.fronting.wire_messages import WireAddress
from offramp.deploy.serve.fronting.worker_wire import Call, WorkerWire

FRONTS = "offramp"
"""Ray's namespace of fronts."""

ANSWER_S = 2.0
"""A front that does not say for so long where it listens is asked again later."""

_PAUSE_S = 0.1


class FrontLink:
    """Finds a front by its name, which the next one has, too.

    Args:
        front: Its name; it is waited for.
        model: The model that the worker serves.
        worker: The worker's own name.
    """

    def __init__(self, front: str, model: str, worker: str) -> None:
        self._name, self._model, self._worker = front, model, worker
        self._told: Any = None
        self._renewing = asyncio.Lock()
        self._wire: WorkerWire | None = None
        self._open: Callable[[WireAddress], WorkerWire] | None = None
        while (found := self._found()) is None:
            time.sleep(_PAUSE_S)
        self._front = found

    def answer(
        self, begin: Callable[[Call], object], is_healthy: Callable[[], bool], drain_s: float
    ) -> None:
        """Take requests from now on.

        Args:
            begin, is_healthy: See ``WorkerWire``.
            drain_s: Seconds that requests have to end once the process is told to.
        """
        self._open = lambda address: WorkerWire(address, self._worker, begin, is_healthy)
        self._wire = self._open(ray.get(self._front.wire.remote()))
        # At SIGTERM Ray has the process end in order, and knows nothing of these requests.
        atexit.register(self.drain, drain_s)

    @property
    def tokens(self) -> int:
        """Tokens that the requests under way may come to."""
        calls = [] if self._wire is None else list(self._wire.calls.values())
        return sum(call.asked.tokens for call in calls)

    def flush(self) -> None:
        """Send what waits; see ``WorkerWire``."""
        if self._wire is not None:
            self._wire.flush()

    def drain(self, seconds: float) -> None:
        """Take no more requests; return once none is under way, or so much later."""
        if self._wire is None:
            return
        end_s = time.monotonic() + seconds
        self._wire.leave()
        time.sleep(_PAUSE_S)  # for what the front had sent by then
        while self._wire.is_busy and time.monotonic() < end_s:
            time.sleep(_PAUSE_S)

    async def hear(self, report: dict[str, Any]) -> None:
        """Tell it how the worker is, once it is found again if it was lost."""
        if self._is_lost and not self._renewing.locked():
            async with self._renewing:
                await asyncio.to_thread(self._renew)
        self._told = self._front.hear.remote(self._model, report)

    def log(self, line: str) -> None:
        """Hand it a line that the worker logged."""
        self._front.log.remote(line)

    @property
    def _is_lost(self) -> bool:
        """Whether its connection is broken, or it was gone when it was told something last."""
        if self._wire is not None and self._wire.is_broken:
            return True
        if self._told is None or not ray.wait([self._told], timeout=0)[0]:
            return False
        try:
            ray.get(self._told)
        except RayActorError:
            return True
        except RayError:  # what it made of the report is its own affair
            return False
        return False

    def _renew(self) -> None:
        """Find the front again; while there is none that listens, it stays lost."""
        with contextlib.suppress(RayActorError, GetTimeoutError, OSError):
            if (front := self._found()) is not None:
                self._reconnect(ray.get(front.wire.remote(), timeout=ANSWER_S))
                self._front, self._told = front, None

    def _reconnect(self, address: WireAddress) -> None:
        """Take requests from there; a front that was only out of reach is still connected."""
        before = self._wire
        if self._open is None or before is None:
            return
        if address != before.address or before.is_broken:
            self._wire = self._open(address)
            before.close()

    def _found(self) -> Any:
        """The actor of that name; None: it is not there yet, or not any more."""
        try:
            return ray.get_actor(self._name, namespace=FRONTS)
        except ValueError:
            return None
