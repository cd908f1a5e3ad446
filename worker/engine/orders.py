"""What the engine's thread is told to do, and whom it tells what becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, Request, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import Prompt


class Listener(Protocol):
    """Is told of requests in the engine's thread, which waits for it meanwhile."""

    def accept(self, requests: Sequence[Request]) -> None:
        """Take note of the requests, in order, before any event of theirs."""
        ...

    def tell(self, event: TokenEvent | Exception) -> None:
        """Take an event; an error ends all requests of this listener."""
        ...


@dataclass(frozen=True, slots=True)
class QueueListener:
    """Hands events to a coroutine.

    Attributes:
        loop: The coroutine's.
    """

    loop: asyncio.AbstractEventLoop
    _events: asyncio.Queue[TokenEvent | Exception] = field(default_factory=asyncio.Queue)

    def accept(self, requests: Sequence[Request]) -> None:
        """Need no preparation."""

    def tell(self, event: TokenEvent | Exception) -> None:
        """Take an event."""
        # A client whose loop is closed, perhaps this moment, can no longer be told anything.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, requests: int) -> AsyncIterator[TokenEvent]:
        """Events as they come, until so many requests have ended, or an error comes."""
        while requests:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            requests -= event.finish_reason is not None
            yield event


@dataclass(frozen=True, slots=True)
class Submit:
    """Queue ``sampling.n`` requests per prompt.

    Attributes:
        prompts, sampling, kv_mode, prefill, split_by, cache_salt: See ``EngineService.submit``.
        listener: Is told of all of them.
        accepted: Gets the requests, or why there are none.
    """

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    kv_mode: KVWish | None
    prefill: Prefill | None
    split_by: str | None
    cache_salt: str
    listener: Listener
    accepted: Future[list[Request]]

    @property
    def count(self) -> int:
        """Requests that it asks for."""
        return len(self.prompts) * self.sampling.n


@dataclass(frozen=True, slots=True)
class Cancel:
    """Free the slots of requests, if they have any."""

    request_ids: tuple[str, ...]
