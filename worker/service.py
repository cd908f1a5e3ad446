"""The engine behind an asyncio front: one thread decodes, coroutines await their tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass

from offramp.controller.errors import OfframpError, OverloadedError
from offramp.worker.admission import Prompt
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.sampling import SamplingParams
from offramp.worker.sequence import Request, TokenEvent

log = logging.getLogger(__name__)

STUCK_AFTER_S = 30.0
"""A busy engine that finished no step for this long is reported unhealthy."""

RETRY_AFTER_S = 1
"""What an overloaded service tells its clients to wait."""


STOPPED = "the worker is shutting down"
"""What open streams and late requests are told once the service stops."""


class DecodeFailedError(OfframpError):
    """The engine raised in the middle of a step; the cause is chained."""


@dataclass(frozen=True, slots=True)
class _Listener:
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | Exception]

    def tell(self, event: TokenEvent | Exception) -> None:
        # A client whose loop is closed, perhaps this moment, can no longer be told anything.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass(frozen=True, slots=True)
class _Submit:
    prompt: Prompt
    sampling: SamplingParams
    listener: _Listener
    accepted: Future[Request]


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class EngineService:
    """Runs an engine in its own thread.

    Args:
        engine: Used by this service's thread only, from ``start`` on.
        max_waiting: Requests that may wait for a slot; one more is refused.
    """

    def __init__(self, engine: AdaptiveEngine, *, max_waiting: int = 64) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.tokens_emitted = 0
        self._commands: queue.Queue[_Submit | _Cancel | None] = queue.Queue()
        self._listeners: dict[str, _Listener] = {}
        self._last_step_s = time.monotonic()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="offramp-engine", daemon=True)

    def start(self) -> None:
        """Start decoding."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step under way; streams still open end with an error."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and, if it has work, makes progress."""
        idle = self.engine.load == (0, 0)
        recent = time.monotonic() - self._last_step_s < STUCK_AFTER_S
        return self._thread.is_alive() and (idle or recent)

    async def submit(
        self, prompt: Prompt, sampling: SamplingParams
    ) -> tuple[Request, AsyncIterator[TokenEvent]]:
        """Queue a request; its policy is pinned when this returns.

        Closing the iterator frees the request's slot within one step.

        Raises:
            RequestError: the request cannot be served.
            OverloadedError: every slot is taken and the line is full.
            DecodeFailedError: the service has stopped.
        """
        listener = _Listener(asyncio.get_running_loop(), asyncio.Queue())
        accepted: Future[Request] = Future()
        self._commands.put(_Submit(prompt, sampling, listener, accepted))
        if self._has_ended:
            self._refuse_queued()
        try:
            request = await asyncio.wrap_future(accepted)
        except asyncio.CancelledError:
            # The thread may have accepted it meanwhile, and nobody will read its tokens.
            accepted.add_done_callback(self._abandon)
            raise
        return request, self._listen(request.id, listener)

    async def _listen(self, request_id: str, listener: _Listener) -> AsyncIterator[TokenEvent]:
        try:
            while True:
                event = await listener.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._commands.put(_Cancel(request_id))

    def _abandon(self, accepted: Future[Request]) -> None:
        if not accepted.cancelled() and accepted.exception() is None:
            self._commands.put(_Cancel(accepted.result().id))

    def _run(self) -> None:
        while True:
            idle = self.engine.load == (0, 0)
            if not self._obey(block=idle):
                self._fail_all(DecodeFailedError(STOPPED))
                self._has_ended = True
                self._refuse_queued()
                return
            try:
                self._deliver(self.engine.step())
            except Exception as error:
                log.exception("decoding failed; the requests under way are ended")
                failure = DecodeFailedError("decoding failed")
                failure.__cause__ = error
                self._fail_all(failure)
            self._last_step_s = time.monotonic()

    def _obey(self, *, block: bool) -> bool:
        """Carry out queued commands; False once told to stop."""
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            block = False
            if command is None:
                return False
            if isinstance(command, _Cancel):
                self.engine.cancel(command.request_id)
                self._listeners.pop(command.request_id, None)
            else:
                self._accept(command)

    def _accept(self, command: _Submit) -> None:
        if not command.accepted.set_running_or_notify_cancel():
            return
        # Counted with the free slots: requests of one burst all wait until the next step.
        if sum(self.engine.load) >= self.engine.kv.slots + self.max_waiting:
            command.accepted.set_exception(OverloadedError(RETRY_AFTER_S))
            return
        try:
            request = self.engine.submit(command.prompt, command.sampling)
        except Exception as error:
            command.accepted.set_exception(error)
            return
        self._last_step_s = time.monotonic()
        self._listeners[request.id] = command.listener
        command.accepted.set_result(request)

    def _refuse_queued(self) -> None:
        """Answer what came too late for the thread; called by it and by late callers."""
        while True:
            try:
                command = self._commands.get(block=False)
            except queue.Empty:
                return
            if isinstance(command, _Submit) and command.accepted.set_running_or_notify_cancel():
                command.accepted.set_exception(DecodeFailedError(STOPPED))

    def _deliver(self, events: list[TokenEvent]) -> None:
        self.tokens_emitted += len(events)
        for event in events:
            self._tell(event.request_id, event)

    def _tell(self, request_id: str, event: TokenEvent | Exception) -> None:
        listener = self._listeners.get(request_id)
        if listener is not None:
            listener.tell(event)

    def _fail_all(self, error: Exception) -> None:
        for request_id in list(self._listeners):
            self.engine.cancel(request_id)
            self._tell(request_id, error)
            del self._listeners[request_id]
