"""Events up to a point in time, whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from offramp.deploy.http.limits import DeadlineError, until

UNTOLD = nullcontext(lambda _: None)


class Source:
    """Gives two events at once, and then nothing."""

    def __init__(self) -> None:
        self.is_closed = False

    async def events(self) -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
            await asyncio.Event().wait()
        finally:
            self.is_closed = True


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_what_comes_in_time_is_passed_on_and_then_the_deadline_is_told() -> None:
    async def scenario() -> None:
        source = Source()
        events = until(source.events(), now_s() + 0.05, UNTOLD)
        assert [await anext(events), await anext(events)] == [1, 2]
        with pytest.raises(DeadlineError):
            await anext(events)
        assert source.is_closed
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left that would cancel it

    asyncio.run(scenario())


def test_a_source_that_ends_has_no_deadline_any_more() -> None:
    async def short() -> AsyncIterator[int]:
        yield 1

    async def scenario() -> list[int]:
        found = [event async for event in until(short(), now_s() + 0.02, UNTOLD)]
        await asyncio.sleep(0.05)
        return found

    assert asyncio.run(scenario()) == [1]


def test_another_task_may_take_over() -> None:
    """A route waits for the first token, the response for the others."""

    async def scenario() -> None:
        source = Source()
        events = until(source.events(), now_s() + 0.05, UNTOLD)
        assert await asyncio.create_task(anext(events)) == 1  # type: ignore[arg-type]
        assert await anext(events) == 2
        with pytest.raises(DeadlineError):
            await asyncio.create_task(anext(events))  # type: ignore[arg-type]
        assert source.is_closed

    asyncio.run(scenario())


def test_who_is_cancelled_by_somebody_else_is_not_told_of_a_deadline() -> None:
    async def scenario() -> None:
        source = Source()

        async def follow() -> None:
            async for _ in until(source.events(), now_s() + 60, UNTOLD):
                pass

        task = asyncio.create_task(follow())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert source.is_closed

    asyncio.run(scenario())


def test_who_follows_is_told_each_event_and_the_deadline() -> None:
    told: list[object] = []

    @contextmanager
    def following() -> Iterator[Callable[[int], None]]:
        try:
            yield told.append
        except DeadlineError as error:
            told.append(error)
            raise

    async def scenario() -> None:
        events = until(Source().events(), now_s() + 0.05, following())
        for event in (1, 2):
            assert await anext(events) == event
            assert told[-1] == event
        with pytest.raises(DeadlineError) as late:
            await anext(events)
        assert told == [1, 2, late.value]

    asyncio.run(scenario())
