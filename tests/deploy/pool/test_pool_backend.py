"""Which worker gets a request, and which gets it when that one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.backend import Direct, Tokens, WorkerLostError
from offramp.deploy.serve.fronting import pool_backend, worker_links
from offramp.deploy.serve.fronting.pool_backend import PoolBackend
from offramp.deploy.serve.fronting.wire_messages import WireAddress, packed, packed_text
from offramp.deploy.serve.fronting.worker_links import SilentWorkerError, WorkerLinks
from offramp.deploy.serve.fronting.worker_wire import Call
from offramp.deploy.serve.pool_config import PoolModel
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.spec import WorkerSpec
from support.pools.served_pool import ROOT
from support.pools.wire_worker import WireWorker, connected, run

SLOTS, WAITING = 2, 1
ONE = SamplingParams(max_tokens=1)
LAST = TokenEvent("mine", 5, "five", 3, 7, "length")
TEXT = ClassifiedText(2, "refund", (0.25, 0.25, 0.5), 4, 7)


class HeardPool:
    """A backend, and the workers that it has heard of."""

    def __init__(self, links: WorkerLinks, address: WireAddress) -> None:
        spec = WorkerSpec(model=str(ROOT / "models" / "reference"), slots=SLOTS)
        model = PoolModel(worker=spec, name="reference", channel="main", max_waiting=WAITING)
        self.backend = PoolBackend(model, ClientKeys(), links)
        self.model = model
        self.workers: dict[str, WireWorker] = {}
        self._links, self._address = links, address

    async def add(self, name: str) -> WireWorker:
        """Another worker, which has reported."""
        self.workers[name] = await connected(self._links, self._address, name)
        self.hear(name)
        await self.backend.connect("app", self.model)
        return self.workers[name]

    def hear(self, name: str) -> None:
        report = {"worker": name, "replica": name, "app": "app", "context": 64, "most_tokens": 64}
        self.backend.hear(report)

    def ask(
        self, sampling: SamplingParams = ONE, direct: Direct | None = None
    ) -> asyncio.Task[list[Tokens]]:
        """A request, with all that comes of it."""

        async def asked() -> list[Tokens]:
            events = await self.backend.submit_all(
                [[1, 2]],
                sampling,
                kv_mode=None,
                prefill=None,
                request_id="mine",
                cache_salt="",
                direct=direct or Direct(),
            )
            return [tokens async for tokens in events]

        return asyncio.create_task(asked())

    async def asked(self, count: int = 1) -> list[tuple[str, Call]]:
        """Who was asked so far, once so many were; in no order."""
        while len(found := self._calls()) < count:
            await asyncio.sleep(0.01)
        return found

    def _calls(self) -> list[tuple[str, Call]]:
        return [(name, call) for name, each in self.workers.items() for call in each.calls]


def answer(call: Call) -> None:
    call.accept()
    call.answer(packed(call.number, 0, LAST), is_last=True)
    call.flush()


def played(scenario: Callable[[HeardPool], Awaitable[Any]]) -> None:
    async def within(links: WorkerLinks, address: WireAddress) -> None:
        await scenario(HeardPool(links, address))

    run(within)


def test_the_idlest_gets_it_and_who_has_no_room_nothing() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        await pool.add("b")
        tasks = [pool.ask() for _ in range(2 * (SLOTS + WAITING))]
        asked = await pool.asked(len(tasks))
        assert sorted(name for name, _ in asked) == ["a"] * 3 + ["b"] * 3
        with pytest.raises(OverloadedError):
            await pool.ask()
        for _, call in asked:
            answer(call)
        assert await asyncio.gather(*tasks) == [[[(0, LAST)]]] * len(tasks)
        assert pool.backend.load() == (0, 6)

    played(scenario)


def test_what_no_worker_has_room_for_is_refused_at_once() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        await pool.add("b")
        with pytest.raises(RequestError, match="n: 4 at once exceed the 3"):
            await pool.ask(replace(ONE, n=4))
        with pytest.raises(RequestError, match="input: 4"):
            await pool.backend.classify([[1]] * 4, quality=None, request_id="mine")
        assert pool.backend.load() == (0, 6)

    played(scenario)


def test_who_waits_for_room_gets_it_in_order_and_is_told_the_end() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        await pool.add("b")
        first = [pool.ask(replace(ONE, n=2)) for _ in range(2)]
        large, small = pool.ask(replace(ONE, n=2)), None
        await pool.asked(2)
        await asyncio.sleep(0.05)
        assert len(await pool.asked()) == 2  # each has room for one, and none for two
        pool.backend._room += 1
        assert len(await pool.asked(3)) == 3
        pool.backend._room -= 1
        assert not large.done()
        pool.workers.pop("a").wire.close()
        small = pool.ask(replace(ONE, n=2))
        await asyncio.sleep(0.1)
        pool.backend.is_draining = True
        pool.backend.abandon()
        for task in (*first, large, small):
            with pytest.raises((DecodeFailedError, OverloadedError)):
                await task
        assert pool.backend.load()[0] == 0

    played(scenario)


def test_what_a_leaving_worker_has_takes_no_room_from_others() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        leaving = [pool.ask() for _ in range(3)]
        await pool.asked(3)
        await pool.add("b")
        assert pool.backend.load() == (3, 6)
        pool.workers["a"].wire.leave()
        while len(pool._links.reached()) == 2:
            await asyncio.sleep(0.01)
        assert pool.backend.load() == (3, 6)
        tasks = [pool.ask() for _ in range(3)]
        assert len(await pool.asked(6)) == 6
        with pytest.raises(OverloadedError):
            await pool.ask()
        for task in (*leaving, *tasks):
            task.cancel()

    played(scenario)


def test_who_reported_long_ago_gets_it_if_nobody_else_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        monkeypatch.setattr(pool_backend, "AWAKE_S", 0.2)
        await asyncio.sleep(0.3)
        await pool.add("b")
        tasks = []
        for number in range(4):
            pool.hear("b")
            tasks.append(pool.ask())
            await pool.asked(number + 1)
        assert sorted(name for name, _ in await pool.asked(4)) == ["a", "b", "b", "b"]
        for task in tasks:
            task.cancel()

    played(scenario)


def test_a_worker_that_is_about_to_end_gets_nothing_more() -> None:
    async def scenario(pool: HeardPool) -> None:
        leaving = await pool.add("a")
        kept = pool.ask()
        [(_, call)] = await pool.asked()
        leaving.wire.leave()
        while pool._links.reached():
            await asyncio.sleep(0.01)
        assert pool.backend.trouble() == "without workers"
        with pytest.raises(OverloadedError):
            await pool.ask()
        await pool.add("b")
        assert pool.backend.trouble() is None
        late = pool.ask()
        assert {name for name, _ in await pool.asked(2)} == {"a", "b"}
        answer(call)
        assert await kept == [[(0, LAST)]]
        answer(pool.workers["b"].calls[0])
        assert await late == [[(0, LAST)]]

    played(scenario)


def test_a_request_without_a_token_survives_one_worker_that_dies() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        task = pool.ask()
        await pool.asked()
        pool.workers.pop("a").wire.close()
        await pool.add("b")
        await pool.asked()
        pool.workers.pop("b").wire.close()
        with pytest.raises(WorkerLostError) as raised:
            await task
        assert not isinstance(raised.value, SilentWorkerError)
        assert pool.backend.load()[0] == 0

    played(scenario)


def test_one_that_has_sent_a_token_is_not_begun_again() -> None:
    async def scenario(pool: HeardPool) -> None:
        lost = await pool.add("a")
        task = pool.ask(SamplingParams(max_tokens=2))
        [(_, call)] = await pool.asked()
        call.accept()
        call.answer(packed(call.number, 0, LAST._replace(finish_reason=None)), is_last=False)
        call.flush()
        await asyncio.sleep(0.05)
        await pool.add("b")
        lost.wire.close()
        with pytest.raises(WorkerLostError):
            await task
        assert not pool.workers["b"].calls

    played(scenario)


def some(call: Call, *texts: str) -> Tokens:
    """Have tokens sent that end no request."""
    tokens: Tokens = [(0, LAST._replace(text=text, finish_reason=None)) for text in texts]
    for index, event in tokens:
        call.answer(packed(call.number, index, event), is_last=False)
    call.flush()
    return tokens


def test_tokens_that_are_waited_for_go_the_direct_way_but_for_the_first_and_the_last() -> None:
    sent: Tokens = []
    told: Tokens = []
    direct, is_read = Direct(), True

    def write(tokens: Tokens) -> bool:
        sent.extend(tokens if is_read else [])
        return is_read

    async def scenario(pool: HeardPool) -> None:
        nonlocal is_read
        await pool.add("a")
        direct.told = told.extend
        task = pool.ask(SamplingParams(max_tokens=9), direct)
        [(_, call)] = await pool.asked()
        call.accept()
        first = some(call, "first")
        await asyncio.sleep(0.1)
        direct.write = write
        second = some(call, "second", "with it")
        while len(sent) < len(second):
            await asyncio.sleep(0.01)
        is_read = False
        third = some(call, "third")
        await asyncio.sleep(0.1)
        is_read = True
        fourth = some(call, "fourth")
        while len(sent) < len(second + fourth):
            await asyncio.sleep(0.01)
        answer(call)
        assert await task == [first, third, [(0, LAST)]]
        assert sent == told == second + fourth

    played(scenario)


def test_what_cannot_be_written_ends_its_own_request() -> None:
    def write(tokens: Tokens) -> bool:
        raise KeyError("a bug")

    async def scenario(pool: HeardPool) -> None:
        worker, direct = await pool.add("a"), Direct()
        direct.write = write
        task, other = pool.ask(SamplingParams(max_tokens=2), direct), pool.ask()
        for _, call in await pool.asked(2):
            call.accept()
            some(call, "one")
        with pytest.raises(KeyError, match="a bug"):
            await task
        await worker.has(worker.given_up)
        [ours] = [each for each in worker.calls if each.number not in worker.given_up]
        answer(ours)
        assert (await other)[-1] == [(0, LAST)]

    played(scenario)


def test_silent_workers_are_passed_over_until_there_were_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_links, "SILENCE_S", 1.6)
    monkeypatch.setattr(pool_backend, "TRIES", 2)

    async def scenario(pool: HeardPool) -> None:
        for name in ("a", "b", "c"):
            (await pool.add(name)).is_healthy = False
        for link in pool._links._links.values():
            link._silent = 0  # so that all fall silent at one look
        task = pool.ask()
        while pool._links.reached():
            await asyncio.sleep(0.01)
        assert len(await pool.asked()) == 1
        for worker in pool.workers.values():
            worker.is_healthy = True
        assert len(await pool.asked(2)) == 2
        assert not task.done()
        for worker in pool.workers.values():
            worker.is_healthy = False
        with pytest.raises(SilentWorkerError):
            await task

    played(scenario)


def test_texts_are_classified_anew_where_some_were_answered_already() -> None:
    async def scenario(pool: HeardPool) -> None:
        lost = await pool.add("a")
        task = asyncio.create_task(
            pool.backend.classify([[1], [2]], quality=None, request_id="mine")
        )
        [(_, call)] = await pool.asked()
        wrong = replace(TEXT, label=0)
        call.answer(packed_text(call.number, 1, wrong), is_last=True)
        call.flush()
        await asyncio.sleep(0.05)
        await pool.add("b")
        lost.wire.close()
        await pool.asked(2)
        [again] = pool.workers["b"].calls
        for place in (1, 0):
            again.answer(packed_text(again.number, place, TEXT), is_last=True)
        again.flush()
        assert await task == [TEXT, TEXT]

    played(scenario)


def test_a_worker_that_has_no_room_yet_is_asked_again() -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        task = pool.ask()
        [(_, call)] = await pool.asked()
        call.fail(OverloadedError(1))
        call.flush()
        await pool.asked(2)
        answer(pool.workers["a"].calls[-1])
        assert await task == [[(0, LAST)]]

    played(scenario)


def test_a_pool_that_drains_waits_for_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(pool: HeardPool) -> None:
        await pool.add("a")
        task = pool.ask()
        await pool.asked()
        pool.workers.pop("a").wire.close()
        await asyncio.sleep(0.1)
        assert not task.done()
        monkeypatch.setattr(pool_backend, "FORGET_S", 0.0)
        pool.backend.is_draining = True
        with pytest.raises(WorkerLostError):
            await task

    played(scenario)
