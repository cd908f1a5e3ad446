"""The service: what coroutines see of the engine's thread."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import PolicySnapshot, Request, TokenEvent
from offramp.worker.engine import service as service_module
from offramp.worker.engine.service import EngineService
from offramp.worker.spec import freeze_heap

PROMPTS = [
    "def main():\n",
    "import json\nimport os\n\n\nclass",
    "x",
    "for i in range(10):\n    print",
]
PATIENCE_S = 60.0
"""A test that waits longer for an event has failed."""


class Brake:
    """Holds an engine's steps: while it is on, nothing is admitted and no token is emitted."""

    def __init__(self, engine: AdaptiveEngine) -> None:
        self.released = threading.Event()
        self.reached = threading.Event()
        self._step = engine.step
        engine.step = self._held_step  # type: ignore[assignment]  # it takes all that step takes

    def _held_step(self, *arguments: Any) -> list[TokenEvent]:
        self.reached.set()
        if self.released.wait(0.005):
            return self._step(*arguments)
        return []


@pytest.fixture
def make_engine(reference: AdaptiveEngine) -> Callable[..., AdaptiveEngine]:
    def make(slots: int = 2, **options: Any) -> AdaptiveEngine:
        return AdaptiveEngine(reference.stack.model, reference.tokenizer, slots=slots, **options)

    return make


@contextmanager
def serving(engine: AdaptiveEngine, max_waiting: int = 64) -> Iterator[EngineService]:
    service = EngineService(engine, max_waiting=max_waiting)
    service.start()
    try:
        yield service
    finally:
        service.stop()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def within() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    return asyncio.run(within())


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


async def collect(
    service: EngineService, prompt: Any, sampling: SamplingParams
) -> list[TokenEvent]:
    _, events = await service.submit(prompt, sampling)
    return [event async for event in events]


async def settle(service: EngineService) -> None:
    """Returns once every earlier command was obeyed: they are taken in order."""
    with pytest.raises(RequestError):
        await service.submit([], tokens(1))


async def close(events: AsyncIterator[TokenEvent]) -> None:
    await events.aclose()  # type: ignore[attr-defined]


def test_a_stream_is_what_generate_returns(
    make_engine: Callable[..., AdaptiveEngine], reference: AdaptiveEngine
) -> None:
    expected = reference.generate(PROMPTS[0], tokens(12))[0]
    with serving(make_engine()) as service:
        events = run(collect(service, PROMPTS[0], tokens(12)))
        assert service.tokens_emitted == 12
    assert [event.token for event in events] == expected.token_ids
    assert "".join(event.text for event in events) == expected.text
    assert [event.exit_layer for event in events] == expected.exit_layers
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]


def test_more_streams_than_slots_do_not_disturb_each_other(
    make_engine: Callable[..., AdaptiveEngine], reference: AdaptiveEngine
) -> None:
    expected = [
        reference.generate(prompt, tokens(6 + 3 * i))[0].token_ids
        for i, prompt in enumerate(PROMPTS)
    ]

    async def all_at_once(service: EngineService) -> list[list[TokenEvent]]:
        return await asyncio.gather(
            *(collect(service, prompt, tokens(6 + 3 * i)) for i, prompt in enumerate(PROMPTS))
        )

    with serving(make_engine(slots=2)) as service:
        streams = run(all_at_once(service))
    assert [[event.token for event in stream] for stream in streams] == expected


class Told:
    """A listener that never says that it has heard the end."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def accept(self, requests: Sequence[Request]) -> None:
        pass

    def tell(self, event: TokenEvent | Exception) -> None:
        if isinstance(event, Exception) or event.finish_reason is not None:
            self.ended.set()


def test_who_was_told_the_end_is_forgotten(make_engine: Callable[..., AdaptiveEngine]) -> None:
    with serving(make_engine()) as service:
        told = Told()
        ordered = service.order([[11, 12]], tokens(3), told)
        assert told.ended.wait(PATIENCE_S)
        run(settle(service))
        assert not service._listeners
        service.withdraw(ordered)  # what has ended is not disturbed, nor what comes after it
        assert len(run(collect(service, PROMPTS[0], tokens(3)))) == 3


def test_closing_a_stream_frees_its_slot(make_engine: Callable[..., AdaptiveEngine]) -> None:
    async def scenario(service: EngineService) -> None:
        _, events = await service.submit(PROMPTS[0], tokens(900))
        await anext(events)
        await anext(events)
        assert service.engine.load == (1, 0)
        await close(events)
        await settle(service)
        assert service.engine.load == (0, 0)
        assert len(await collect(service, PROMPTS[1], tokens(4))) == 4

    with serving(make_engine(slots=1)) as service:
        run(scenario(service))


def test_a_reader_cancelled_while_it_waits_frees_its_place(
    make_engine: Callable[..., AdaptiveEngine],
) -> None:
    engine = make_engine(slots=1)
    brake = Brake(engine)

    async def scenario(service: EngineService) -> None:
        reader = asyncio.create_task(collect(service, PROMPTS[0], tokens(900)))
        while service.engine.load == (0, 0):
            await asyncio.sleep(0)
        await settle(service)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await settle(service)
        assert service.engine.load == (0, 0)

    with serving(engine) as service:
        run(scenario(service))
        brake.released.set()


def test_a_caller_cancelled_after_it_was_accepted_leaves_nothing_behind(
    make_engine: Callable[..., AdaptiveEngine],
) -> None:
    engine = make_engine(slots=1)
    brake = Brake(engine)

    async def scenario(service: EngineService) -> None:
        # Token ids: a string would first be encoded, on a thread that answers to the loop.
        caller = asyncio.create_task(service.submit([5, 6, 7], tokens(900)))
        await asyncio.sleep(0)
        # This blocks the loop: the thread accepts, but the caller cannot learn of it.
        assert brake.reached.wait(PATIENCE_S)
        assert engine.load == (0, 1)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        await settle(service)
        assert engine.load == (0, 0)

    with serving(engine) as service:
        run(scenario(service))


def test_a_full_line_is_refused_and_free_slots_count(
    make_engine: Callable[..., AdaptiveEngine],
) -> None:
    engine = make_engine(slots=2)
    brake = Brake(engine)

    async def scenario(service: EngineService) -> None:
        # A burst: none is admitted yet, but two of three have a slot waiting for them.
        burst = [await service.submit(PROMPTS[0], tokens(3)) for _ in range(3)]
        with pytest.raises(OverloadedError) as refused:
            await service.submit(PROMPTS[0], tokens(3))
        assert refused.value.retry_after_s >= 1
        brake.released.set()
        for _, events in burst:
            assert len([event async for event in events]) == 3
        assert len(await collect(service, PROMPTS[0], tokens(3))) == 3

    with serving(engine, max_waiting=1) as service:
        run(scenario(service))


@pytest.mark.parametrize(
    ("prompt", "count", "field"),
    [
        ("", 4, "prompt"),
        ([], 4, "prompt"),
        ("half a pair: \ud800", 4, "prompt"),
        ([5, -1], 4, "prompt"),
        ([5, 4096], 4, "prompt"),
        ([5, 10**30], 4, "prompt"),
        ([1.5], 4, "prompt"),
        ([5] * 1000, 25, "max_tokens"),
    ],
)
def test_a_bad_request_is_refused_and_disturbs_nobody(
    make_engine: Callable[..., AdaptiveEngine],
    reference: AdaptiveEngine,
    prompt: Any,
    count: int,
    field: str,
) -> None:
    expected = reference.generate(PROMPTS[0], tokens(5))[0].token_ids

    async def scenario(service: EngineService) -> list[TokenEvent]:
        _, events = await service.submit(PROMPTS[0], tokens(5))
        seen = [await anext(events)]
        with pytest.raises(RequestError) as refused:
            await service.submit(prompt, tokens(count))
        assert refused.value.field == field
        return seen + [event async for event in events]

    with serving(make_engine()) as service:
        seen = run(scenario(service))
    assert [event.token for event in seen] == expected


def test_a_failing_step_ends_the_open_streams_and_not_the_service(
    make_engine: Callable[..., AdaptiveEngine],
    reference: AdaptiveEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(slots=2)

    def explode(*_: Any) -> Any:
        raise MemoryError("no room")

    async def scenario(service: EngineService) -> None:
        streams = [(await service.submit(prompt, tokens(900)))[1] for prompt in PROMPTS[:2]]
        for events in streams:
            await anext(events)
        with monkeypatch.context() as patch:
            patch.setattr(engine.decoder, "launch", explode)
            for events in streams:
                with pytest.raises(DecodeFailedError) as failed:
                    [event async for event in events]
                assert isinstance(failed.value.__cause__, MemoryError)
                await settle(service)
                assert engine.load == (0, 0)  # those that nobody has read yet are gone too
        assert service.is_healthy
        again = await collect(service, PROMPTS[1], tokens(6))
        assert [e.token for e in again] == reference.generate(PROMPTS[1], tokens(6))[0].token_ids

    with serving(engine) as service:
        run(scenario(service))


def test_a_prompt_that_fails_ends_its_own_stream_alone(
    make_engine: Callable[..., AdaptiveEngine],
    reference: AdaptiveEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(slots=2)

    def explode(*_: Any) -> Any:
        raise MemoryError("no room")

    async def scenario(service: EngineService) -> list[int]:
        _, events = await service.submit(PROMPTS[0], tokens(40))
        seen = [await anext(events)]
        with monkeypatch.context() as patch:
            patch.setattr(engine.decoder, "prefill", explode)
            _, failing = await service.submit(PROMPTS[2], tokens(5))
            with pytest.raises(DecodeFailedError) as failed:
                [event async for event in failing]
        assert isinstance(failed.value.__cause__, MemoryError)
        seen += [event async for event in events]
        return [event.token for event in seen]

    with serving(engine) as service:
        found = run(scenario(service))
    assert found == reference.generate(PROMPTS[0], tokens(40))[0].token_ids


def test_stopping_ends_open_streams_and_refuses_late_callers(
    make_engine: Callable[..., AdaptiveEngine],
) -> None:
    service = EngineService(make_engine(slots=1))
    service.start()

    async def scenario() -> None:
        streams = [(await service.submit(PROMPTS[0], tokens(900)))[1] for _ in range(2)]
        await anext(streams[0])
        await asyncio.to_thread(service.stop)
        for events in streams:  # one was running, one was waiting
            with pytest.raises(DecodeFailedError, match="shutting down"):
                [event async for event in events]
        with pytest.raises(DecodeFailedError, match="shutting down"):
            await service.submit(PROMPTS[0], tokens(1))

    run(scenario())
    assert not service.is_healthy


def test_a_policy_is_pinned_from_first_to_last_token(
    make_engine: Callable[..., AdaptiveEngine],
) -> None:
    releases = {
        1: PolicySnapshot(1, "a", FixedExit(4)),
        2: PolicySnapshot(2, "b", NeverExit()),
        3: PolicySnapshot(3, "c", FixedExit(8)),
    }
    current = [releases[1]]

    async def scenario(service: EngineService) -> dict[int, list[TokenEvent]]:
        seen: dict[int, list[TokenEvent]] = {}
        streams = {}
        for generation, release in releases.items():
            current[0] = release
            _, events = await service.submit(PROMPTS[0], tokens(8))
            streams[generation] = events
            seen[generation] = [await anext(events)]
        for generation, events in streams.items():
            seen[generation] += [event async for event in events]
        return seen

    with serving(make_engine(slots=3, current_policy=lambda: current[0])) as service:
        seen = run(scenario(service))
    for generation, events in seen.items():
        assert [event.generation for event in events] == [generation] * 8
    # The first token comes from the prompt's pass, which is always whole.
    assert [e.exit_layer for e in seen[1]] == [12] + [4] * 7
    assert [e.exit_layer for e in seen[2]] == [12] * 8
    assert [e.exit_layer for e in seen[3]] == [12] + [8] * 7


def test_a_busy_engine_without_progress_is_unhealthy_and_an_idle_one_is_not(
    make_engine: Callable[..., AdaptiveEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    stuck, resume = threading.Event(), threading.Event()
    step = engine.step

    def stick(*arguments: Any) -> list[TokenEvent]:
        stuck.set()
        assert resume.wait(PATIENCE_S)
        return step(*arguments)

    monkeypatch.setattr(engine, "step", stick)
    monkeypatch.setattr(service_module, "STUCK_AFTER_S", 0.0)

    async def scenario(service: EngineService) -> None:
        assert service.is_healthy
        _, events = await service.submit(PROMPTS[0], tokens(2))
        assert stuck.wait(PATIENCE_S)
        assert not service.is_healthy
        resume.set()  # type: ignore[unreachable]  # mypy takes the property for a constant
        assert len([event async for event in events]) == 2
        await settle(service)
        assert service.is_healthy

    with serving(engine) as service:
        run(scenario(service))


def test_a_client_whose_loop_is_gone_harms_nobody(
    make_engine: Callable[..., AdaptiveEngine], reference: AdaptiveEngine
) -> None:
    engine = make_engine(slots=2)
    brake = Brake(engine)
    with serving(engine) as service:
        gone = asyncio.new_event_loop()
        _, events = gone.run_until_complete(service.submit(PROMPTS[0], tokens(4)))
        gone.close()
        brake.released.set()
        seen = run(collect(service, PROMPTS[1], tokens(6)))
        assert [e.token for e in seen] == reference.generate(PROMPTS[1], tokens(6))[0].token_ids
        del events


def test_a_frozen_heap_is_left_out_of_collection() -> None:
    try:
        freeze_heap()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
