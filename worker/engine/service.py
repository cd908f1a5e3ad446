"""The engine behind an asyncio front: one thread decodes, coroutines await their tokens."""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, Request, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import Prompt
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.orders import Cancel, Listener, QueueListener, Submit

log = logging.getLogger(__name__)

STUCK_AFTER_S = 30.0
"""A busy engine that finished no step for this long is reported unhealthy."""

RETRY_AFTER_S = 1
"""What an overloaded service tells its clients to wait."""

Step = Callable[[], list[TokenEvent]]
"""Runs one step of an engine; returns its events."""

STOPPED = "the worker is shutting down"
"""What open streams and late requests are told once the service stops."""


class EngineService:
    """Runs an engine in its own thread.

    Args:
        engine: Used by this service's thread only, from ``start`` on.
        max_waiting: Requests that may wait for a slot; one more is refused.
        after_step: Called in the thread once listeners were told all of a step.
        around: Runs each step that it is given, and returns its events: with a meter, for example.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        *,
        max_waiting: int = 64,
        after_step: Callable[[], object] = lambda: None,
        around: Callable[[Step], list[TokenEvent]] = lambda step: step(),
    ) -> None:
        self.engine = engine
        self._after_step = after_step
        self._around = around
        self.max_waiting = max_waiting
        self.tokens_emitted = 0
        self._commands: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._last_step_s = time.monotonic()
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="offramp-engine", daemon=True)

    def start(self) -> None:
        """Start the thread that decodes."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the step under way; streams still open end with an error."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and, if it has work, makes progress."""
        idle = self.engine.is_idle
        recent = time.monotonic() - self._last_step_s < STUCK_AFTER_S
        return self._thread.is_alive() and (idle or recent)

    async def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
        split_by: str | None = None,
        cache_salt: str = "",
    ) -> tuple[Request, AsyncIterator[TokenEvent]]:
        """Queue a request; its policy is pinned when this returns.

        Closing the iterator frees the request's slot within one step.

        Args:
            prompt: A string or token ids.
            sampling: How to draw tokens.
            kv_mode, prefill, split_by, cache_salt: See ``EngineCore.submit``.

        Raises:
            RequestError: the request cannot be served.
            OverloadedError: every slot is taken and the line is full.
            DecodeFailedError: the service has stopped.
        """
        options: Any = {"prefill": prefill, "split_by": split_by, "cache_salt": cache_salt}
        requests, events = await self.submit_all([prompt], sampling, kv_mode=kv_mode, **options)
        return requests[0], events

    async def submit_all(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
        split_by: str | None = None,
        cache_salt: str = "",
    ) -> tuple[list[Request], AsyncIterator[TokenEvent]]:
        """Queue ``sampling.n`` requests per prompt, in order; all of them run under one policy.

        Their events come from one iterator, as they are emitted. Arguments and errors are those of
        ``submit``, and it is closed as that is.
        """
        if any(isinstance(prompt, str) for prompt in prompts):
            # Once more when they are queued: others come while they are encoded.
            self._require_room(len(prompts) * sampling.n)
        encoder = self.engine.encoder
        given = [
            await encoder.aside(encoder.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        listener = QueueListener(asyncio.get_running_loop())
        options: Any = {"kv_mode": kv_mode, "prefill": prefill, "split_by": split_by}
        accepted = self.order(given, sampling, listener, cache_salt=cache_salt, **options)
        try:
            requests = await asyncio.wrap_future(accepted)
        except asyncio.CancelledError:
            # The thread may have accepted it meanwhile, and nobody will read its tokens.
            self.withdraw(accepted)
            raise
        return requests, self._listen(requests, listener)

    def order(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        listener: Listener,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
        split_by: str | None = None,
        cache_salt: str = "",
    ) -> Future[list[Request]]:
        """Queue requests as ``submit_all`` does, from any thread, with events for a listener.

        Returns:
            The requests once they are accepted, or why they are not; see ``withdraw``.
        """
        accepted: Future[list[Request]] = Future()
        options = (sampling, kv_mode, prefill, split_by, cache_salt)
        self._commands.put(Submit(tuple(prompts), *options, listener, accepted))
        if self._has_ended:  # looked at after the command is queued, so that one of both sees it
            self._refuse_queued()
        return accepted

    def withdraw(self, ordered: Future[list[Request]]) -> None:
        """Give up what was ordered: within one step its slots are free."""
        if not ordered.cancel():
            ordered.add_done_callback(self._abandon)

    async def _listen(
        self, requests: Sequence[Request], listener: QueueListener
    ) -> AsyncIterator[TokenEvent]:
        try:
            async for event in listener.events(len(requests)):
                yield event
        finally:
            self._commands.put(Cancel(_ids(requests)))

    def _abandon(self, ordered: Future[list[Request]]) -> None:
        if not ordered.cancelled() and ordered.exception() is None:
            self._commands.put(Cancel(_ids(ordered.result())))

    def _run(self) -> None:
        while True:
            idle = self.engine.is_idle
            if not self._obey(block=idle):
                self._fail(dict.fromkeys(self._listeners, DecodeFailedError(STOPPED)))
                self._has_ended = True
                self._refuse_queued()
                return
            try:
                self._deliver(self._around(self.engine.step))
                self._fail(self.engine.failed)
            except Exception as error:
                log.exception("decoding failed; the requests under way are ended")
                failure = DecodeFailedError("decoding failed")
                failure.__cause__ = error
                self._fail(dict.fromkeys(self._listeners, failure))
            self._after_step()
            self._last_step_s = time.monotonic()

    def _obey(self, *, block: bool) -> bool:
        """Carry out queued commands; False once told to stop."""
        while block or not self._commands.empty():
            command = self._commands.get()
            block = False  # one command wakes an idle thread; the rest are taken as they lie
            if command is None:
                return False
            if isinstance(command, Cancel):
                for request_id in command.request_ids:
                    self.engine.cancel(request_id)
                    self._listeners.pop(request_id, None)
            else:
                self._accept(command)
        return True

    def _accept(self, command: Submit) -> None:
        if not command.accepted.set_running_or_notify_cancel():
            return
        try:
            self._require_room(command.count)
            requests = self._submit_each(command)
        except Exception as error:
            command.accepted.set_exception(error)
            return
        # An idle engine has made no step for long, and is not stuck for that.
        self._last_step_s = time.monotonic()
        self._listeners.update(dict.fromkeys(_ids(requests), command.listener))
        command.listener.accept(requests)
        command.accepted.set_result(requests)

    def _submit_each(self, command: Submit) -> list[Request]:
        requests: list[Request] = []
        try:
            for prompt, sampling in itertools.product(command.prompts, command.sampling.each()):
                pinned = requests[0].snapshot if requests else None
                requests.append(
                    self.engine.submit(
                        prompt,
                        sampling,
                        pinned,
                        kv_mode=command.kv_mode,
                        prefill=command.prefill,
                        split_by=command.split_by,
                        cache_salt=command.cache_salt,
                    )
                )
        except BaseException:
            for request in requests:
                self.engine.cancel(request.id)
            raise
        return requests

    def _require_room(self, count: int) -> None:
        # Counted with the free slots: requests of one burst all wait until the next step.
        room = self.engine.kv.slots + self.max_waiting
        if count > room:
            raise RequestError(
                "n", f"{count} completions exceed the room for {room}", "Ask for fewer at once"
            )
        if sum(self.engine.load) + count > room:
            raise OverloadedError(RETRY_AFTER_S)

    def _refuse_queued(self) -> None:
        """Answer what came too late for the thread; called by it and by late callers."""
        while True:
            try:
                command = self._commands.get(block=False)
            except queue.Empty:
                return
            if isinstance(command, Submit) and command.accepted.set_running_or_notify_cancel():
                command.accepted.set_exception(DecodeFailedError(STOPPED))

    def _deliver(self, events: list[TokenEvent]) -> None:
        self.tokens_emitted += len(events)
        for event in events:
            self._tell(event.request_id, event)
            if event.finish_reason is not None:
                self._listeners.pop(event.request_id, None)

    def _tell(self, request_id: str, event: TokenEvent | Exception) -> None:
        listener = self._listeners.get(request_id)
        if listener is not None:
            listener.tell(event)

    def _fail(self, errors: Mapping[str, DecodeFailedError]) -> None:
        for request_id, error in list(errors.items()):
            log.error("request %s failed: %r", request_id, error.__cause__ or error)
            self.engine.cancel(request_id)
            self._tell(request_id, error)
            self._listeners.pop(request_id, None)


def _ids(requests: Sequence[Request]) -> tuple[str, ...]:
    return tuple(request.id for request in requests)
