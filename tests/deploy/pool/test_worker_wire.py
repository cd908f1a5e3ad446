"""The connection between the front and a worker: requests go one way, answers the other."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from offramp.controller.costs.readings import EnergyMethod, EnergyShare
from offramp.controller.errors import (
    ConfigError,
    DecodeFailedError,
    OfframpError,
    OverloadedError,
    RequestError,
)
from offramp.controller.release.certified_points import Target
from offramp.deploy.http.backend import WorkerLostError
from offramp.deploy.serve.fronting import worker_links
from offramp.deploy.serve.fronting.wire_messages import (
    ClassesAsked,
    TokensAsked,
    WireAddress,
    packed,
    packed_text,
    unpacked,
    unpacked_text,
)
from offramp.deploy.serve.fronting.worker_links import Arriving, SilentWorkerError, WorkerLinks
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.request import CompletionStats, TokenEvent
from offramp.worker.decoding.sampler import Draw
from offramp.worker.decoding.sampling import SamplingParams
from support.pools.wire_worker import PATIENCE_S, WireWorker, connected, run

ENERGY = EnergyShare(0.25, EnergyMethod.MODELLED, "3 W per busy core", 0.5)
PLAIN = TokenEvent("mine", 5, "five\ud83d", 3, 7, None, text_offset=11)
FULL = TokenEvent(
    "mine",
    6,
    "",
    4,
    7,
    "length",
    logprob=-0.1234567890123,
    top_logprobs=((6, -0.1234567890123), (2, float("-inf"))),
    stats=CompletionStats(
        prompt_tokens=3, generation=7, mean_exit_layer=3.5, cached_tokens=0, energy=ENERGY
    ),
    prompt_draws=(Draw(1, -2.0, ((1, -2.0),)), Draw(2)),
)
TEXT = ClassifiedText(2, "refund", (0.25, 0.25, 0.5), 4, 7, ENERGY, is_best=True)

SAMPLING = SamplingParams(
    max_tokens=5,
    temperature=0.5,
    logit_bias={7: -1.5},
    seed=2**62,
    n=2,
    stop=("\n", "\ud83d"),
    stop_token_ids=(3,),
)
GENERATION = TokensAsked([[1, 2, 3], [4]], SAMPLING, None, "exits", "mine", "salt")
CLASSIFICATION = ClassesAsked([[1, 2], [3]], 0.9, "mine", None)


def ask(
    links: WorkerLinks, asked: TokensAsked = GENERATION, worker: str = "worker-0"
) -> Arriving[TokenEvent]:
    unpack = partial(unpacked, asked.request_id)
    arriving = Arriving(asked.completions, unpack, lambda event: event.finish_reason is not None)
    links.ask(worker, asked, arriving)
    return arriving


def ask_classes(links: WorkerLinks) -> Arriving[ClassifiedText]:
    arriving = Arriving(CLASSIFICATION.completions, unpacked_text, lambda _: True)
    links.ask("worker-0", CLASSIFICATION, arriving)
    return arriving


@pytest.mark.parametrize(
    "wish", [None, "verify", 0.5, 1.0, Target(latency_budget_ms=3.0, quality=0.9)]
)
def test_a_worker_is_asked_what_was_sent(wish: Any) -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker = await connected(links, address)
        ask(links, replace(GENERATION, kv_mode=wish))
        assert (await worker.call()).asked == replace(GENERATION, kv_mode=wish)
        ask_classes(links)
        await worker.has(worker.calls, 2)
        assert (await worker.call()).asked == CLASSIFICATION

    run(scenario)


def test_tokens_come_as_they_were_sent_and_those_of_one_step_together() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker, mine, gone = await connected(links, address), ask(links), ask(links)
        await worker.has(worker.calls, 2)
        gone.unfinished = 0
        links.hang_up("worker-0", gone)
        for call in worker.calls:
            call.accept()
            for place, event in ((0, PLAIN), (2, FULL)):
                call.answer(packed(call.number, place, event), is_last=event is FULL)
        worker.wire.flush()
        assert await mine.take() == []
        came = await mine.take()
        assert came == [(0, PLAIN), (2, FULL)]
        assert (mine.unfinished, mine.is_over) == (GENERATION.completions - 1, False)
        stats = came[1][1].stats
        assert stats is not None
        assert stats.energy == ENERGY  # which is not compared with the other fields

    run(scenario)


def test_what_became_of_texts_comes_as_it_was_sent() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker = await connected(links, address)
        arriving = ask_classes(links)
        call = await worker.call()
        for place, text in ((1, TEXT), (0, replace(TEXT, energy=None))):
            call.answer(packed_text(call.number, place, text), is_last=True)
        call.flush()
        assert await arriving.take() == [(1, TEXT), (0, replace(TEXT, energy=None))]
        assert arriving.is_over
        assert not worker.wire.calls

    run(scenario)


def test_a_worker_is_told_once_of_who_gives_up_and_not_of_what_is_over() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker = await connected(links, address)
        given_up, over, late = (ask(links) for _ in range(3))
        await worker.has(worker.calls, 3)
        for arriving in (given_up, given_up):
            links.hang_up("worker-0", arriving)
        over.unfinished = 0
        links.hang_up("worker-0", over)
        links.hang_up("worker-0", late)
        await worker.has(worker.given_up, 2)
        assert worker.given_up == [given_up.number, late.number]
        assert list(worker.wire.calls) == [over.number]

    run(scenario)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RequestError("n", "is odd", "Ask for more"), RequestError("n", "is odd", "Ask for more")),
        (OverloadedError(3), OverloadedError(3)),
        (DecodeFailedError("it failed"), DecodeFailedError("it failed")),
        (ConfigError("x", "is y"), DecodeFailedError("x: is y.")),
        (KeyError("secret"), DecodeFailedError("the request failed in its worker")),
    ],
)
def test_an_error_ends_a_request_after_its_tokens(error: Exception, told: OfframpError) -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker, mine = await connected(links, address), ask(links)
        call = await worker.call()
        call.answer(packed(call.number, 0, PLAIN), is_last=False)
        call.fail(error)
        call.fail(DecodeFailedError("later"))
        call.flush()
        assert await mine.take() == [(0, PLAIN)]
        with pytest.raises(type(told)) as raised:
            await mine.take()
        assert type(raised.value) is type(told)
        assert str(raised.value) == str(told)
        assert vars(raised.value) == vars(told)
        assert worker.given_up == [call.number]  # other completions of it
        assert not worker.wire.calls

    run(scenario)


def test_a_request_that_cannot_be_begun_or_read_ends_alone() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker, mine = await connected(links, address), ask(links)
        refused = ask(links, replace(GENERATION, request_id="refused"))
        with pytest.raises(RequestError, match="is odd"):
            await refused.take()
        unread = ask(links, replace(GENERATION, prompts=[["no token"]]))  # type: ignore[list-item]
        with pytest.raises(DecodeFailedError):
            await unread.take()
        call = await worker.call()
        call.accept()
        call.flush()
        assert await mine.take() == []
        assert list(worker.wire.calls) == [mine.number]

    run(scenario)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets named like no file")
def test_a_worker_connects_at_its_machines_socket_or_over_the_network_to_another_machines() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        elsewhere = replace(address, local="\0of another machine")
        here = replace(address, port=0)
        for number, each in enumerate((here, elsewhere, replace(address, local=""))):
            name = f"worker-{number}"
            worker, mine = await connected(links, each, name), ask(links, worker=name)
            is_local = worker.wire._socket.family == socket.AF_UNIX
            assert is_local == (each is here)
            call = await worker.call()
            call.answer(packed(call.number, 0, FULL), is_last=True)
            call.flush()
            assert await mine.take() == [(0, FULL)]

    run(scenario)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has sockets named like no file")
def test_whoever_took_a_fronts_name_is_told_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        heard: list[bytes] = []
        with socket.socket(socket.AF_UNIX) as taken:
            taken.bind("\0of somebody else")
            taken.listen()
            monkeypatch.setattr("os.getuid", lambda: -1)  # so the other end is another user's
            worker = await connected(links, replace(address, local="\0of somebody else"))
            with taken.accept()[0] as stranger:
                stranger.settimeout(PATIENCE_S)
                heard.append(stranger.recv(1))
        assert heard == [b""]
        assert worker.wire._socket.family == socket.AF_INET

    run(scenario)


def test_a_broken_connection_ends_its_workers_requests_alone() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker, mine = await connected(links, address), ask(links)
        await connected(links, address, "worker-1")
        other = ask(links, worker="worker-1")
        call = await worker.call()
        call.answer(packed(call.number, 0, PLAIN), is_last=False)
        worker.wire.flush()
        worker.wire.close()
        assert await mine.take() == [(0, PLAIN)]  # what had been sent is not lost
        with pytest.raises(WorkerLostError) as raised:
            await mine.take()
        assert not isinstance(raised.value, SilentWorkerError)
        await worker.has(worker.given_up)
        assert links.reached() == {"worker-1"}
        links.hang_up("worker-0", mine)
        waiting = asyncio.ensure_future(other.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()

    run(scenario)


def test_a_front_that_is_gone_has_its_requests_given_up() -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker = await connected(links, address)
        ask(links)
        await worker.call()
        links._links["worker-0"]._transport.abort()  # type: ignore[union-attr]  # as its end does
        await worker.has(worker.given_up)
        assert worker.wire.is_broken

    run(scenario)


def test_a_worker_without_progress_is_silent_and_is_reached_again_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_links, "SILENCE_S", 2.0)

    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        worker, mine = await connected(links, address), ask(links)
        worker.is_healthy = False
        with pytest.raises(SilentWorkerError):
            await mine.take()
        assert not links.reached()
        worker.is_healthy = True
        while not links.reached():
            await asyncio.sleep(0.01)

    run(scenario)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b'\0\0\0\x0b["x", "me"]']
)
def test_who_does_not_show_the_secret_is_not_heard(said: bytes) -> None:
    async def scenario(links: WorkerLinks, address: WireAddress) -> None:
        with socket.create_connection((address.host, address.port), PATIENCE_S) as stranger:
            stranger.sendall(said)
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(stranger.recv, 1) == b""
        worker, mine = await connected(links, address), ask(links)
        call = await worker.call()
        guessing = await asyncio.to_thread(WireWorker, replace(address, secret="guessed"))
        guessing.wire.add(packed(call.number, 0, PLAIN))
        guessing.wire.flush()
        call.answer(packed(call.number, 1, FULL), is_last=True)
        call.flush()
        assert await mine.take() == [(1, FULL)]

    run(scenario)
