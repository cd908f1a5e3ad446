"""How much and how long a client may ask, and what becomes of one that asks more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from offramp.controller.errors import ConfigError, OfframpError, RequestError
from offramp.controller.release.certified_points import Target
from offramp.deploy.clients.allowances import LOSSLESS, Allowance
from offramp.worker.decoding.request import KVWish

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Bounds on one connection and one request.

    Attributes:
        body_bytes: Most bytes of a request's body.
        body_values: Most JSON values of a body (numbers, strings, lists, objects); a key counts as
            four.
        choices: Most completions of one request, over all of its prompts; or texts classified.
        header_s: Seconds that a client may take for a request's headers, from its first byte (or
            the connection's beginning) on.
        body_s: Seconds that it may take for the body.
        idle_s: Seconds that a connection without a request stays open.
        write_s: Seconds for which it may read nothing while bytes wait for it.
        deadline_s: Seconds from a request's beginning to its last token.
        drain_s: Seconds that requests under way have for their end once the server is to stop.

    Raises:
        ConfigError: a bound that nothing is within.
    """

    body_bytes: int = 8 * 2**20
    body_values: int = 2**18
    choices: int = 128
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 15.0
    write_s: float = 20.0
    deadline_s: float = 600.0
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(name, f"{getattr(self, name)} is not above 0", "Raise it")

    def require_choices(self, count: int, field: str, what: str = "completions") -> None:
        """Refuse a request for too many completions, or other answers.

        Raises:
            RequestError: naming the field.
        """
        if count > self.choices:
            problem = f"asks for {count} {what}, more than {self.choices}"
            raise RequestError(field, problem, "Send several requests")


DEFAULT_LIMITS = HttpLimits()


def wish_within(allowance: Allowance, asked: KVWish | None) -> KVWish | None:
    """What a request asks of its quality, or the least that its client gets if it asks nothing.

    Raises:
        RequestError: it asks for less.
    """
    least = allowance.quality
    if least is None or asked == "verify":
        return asked
    if asked is None:
        return "verify" if least == LOSSLESS else least
    promised = 1.0 if least == LOSSLESS else least
    if isinstance(asked, Target):
        if asked.quality is None or asked.quality >= promised:
            return replace(asked, quality=promised if asked.quality is None else asked.quality)
        asked = asked.quality
    if not isinstance(asked, str) and asked >= promised:
        return asked
    field = "offramp.kv_mode" if isinstance(asked, str) else "offramp.quality"
    problem = f"{asked} does not promise the {least} that this key asks for"
    raise RequestError(field, problem, f'Leave it out, or ask for quality "{LOSSLESS}"')


class DeadlineError(OfframpError):
    """A request was not done in time."""


async def until(
    events: AsyncIterator[Item],
    end_s: float,
    following: AbstractContextManager[Callable[[Item], object]],
) -> AsyncIterator[Item]:
    """Pass events on up to a point in time.

    Args:
        events: An async generator; closed in any case.
        end_s: The point, by the running loop's clock.
        following: Entered meanwhile, and told each event before it is passed on: no further
            generator has to be woken for it.

    Raises:
        DeadlineError: it has come.
    """
    # One timer for all events: a time-out around each costs a quarter of what sending it does.
    waiting: asyncio.Task[Any] | None = None
    late = asyncio.Event()

    def stop() -> None:
        late.set()
        if waiting is not None:
            waiting.cancel()

    timer = asyncio.get_running_loop().call_at(end_s, stop)
    try:
        async with aclosing(events):  # type: ignore[type-var]  # async generators have aclose
            with following as told:
                while not late.is_set():
                    # Whoever asks for the next event may be another task than before.
                    waiting = task = _current_task()
                    before = task.cancelling()
                    try:
                        event = await anext(events)
                    except StopAsyncIteration:
                        return
                    except asyncio.CancelledError:
                        # Perhaps somebody else cancelled it.
                        if not late.is_set() or task.uncancel() > before:
                            raise
                        break
                    finally:
                        waiting = None
                    told(event)
                    yield event
                raise DeadlineError("the request's deadline has passed")
    finally:
        timer.cancel()


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None  # async code runs in one
    return task
