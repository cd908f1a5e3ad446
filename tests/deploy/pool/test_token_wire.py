"""The connection that tokens take from a worker to the front."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import uvloop

from offramp.controller.costs.readings import EnergyMethod, EnergyShare
from offramp.deploy.http.backend import WorkerLostError
from offramp.deploy.serve.fronting.token_inbox import TokenInbox
from offramp.deploy.serve.fronting.token_wire import TokenWire, WireAddress
from offramp.worker.decoding.request import CompletionStats, TokenEvent
from offramp.worker.decoding.sampler import Draw

PATIENCE_S = 20.0

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


def run(scenario: Callable[[TokenInbox, WireAddress], Awaitable[Any]]) -> Any:
    """In the loop that fronts have."""

    async def within() -> Any:
        inbox = TokenInbox()
        address = await inbox.listen("127.0.0.1")
        return await asyncio.wait_for(scenario(inbox, address), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(within())


async def connected(address: WireAddress) -> TokenWire:
    return await asyncio.to_thread(TokenWire, address, "worker-0")


def test_tokens_come_as_they_were_sent_and_those_of_one_step_together() -> None:
    async def scenario(inbox: TokenInbox, address: WireAddress) -> None:
        wire, mine, gone = await connected(address), inbox.expect("mine"), inbox.expect("gone")
        inbox.forget(gone)
        for number in (gone.number, mine.number):
            wire.add(number, 0, PLAIN)
            wire.add(number, 2, FULL)
        wire.flush()
        came = await mine.take()
        assert came == [(0, PLAIN), (2, FULL)]
        stats = came[1][1].stats
        assert stats is not None
        assert stats.energy == ENERGY  # which is not compared with the other fields
        mine.accept("worker-0")
        assert await mine.take() == []

    run(scenario)


def test_a_broken_connection_ends_its_workers_requests_alone() -> None:
    async def scenario(inbox: TokenInbox, address: WireAddress) -> None:
        wire, mine, other = await connected(address), inbox.expect("mine"), inbox.expect("other")
        mine.accept("worker-0")
        other.accept("worker-1")
        assert await mine.take() == await other.take() == []
        wire.add(mine.number, 0, PLAIN)
        wire.flush()
        wire._socket.close()
        assert await mine.take() == [(0, PLAIN)]  # what had been sent is not lost
        with pytest.raises(WorkerLostError):
            await mine.take()
        other.add(0, PLAIN)
        assert await other.take() == [(0, PLAIN)]
        wire.add(mine.number, 0, PLAIN)
        wire.flush()
        assert wire.is_broken

    run(scenario)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b'\0\0\0\x0b["x", "me"]']
)
def test_who_does_not_show_the_secret_is_not_heard(said: bytes) -> None:
    async def scenario(inbox: TokenInbox, address: WireAddress) -> None:
        with socket.create_connection((address.host, address.port), PATIENCE_S) as stranger:
            stranger.sendall(said)
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(stranger.recv, 1) == b""
        wire, mine = await connected(replace(address, secret="guessed")), inbox.expect("mine")
        wire.add(mine.number, 0, PLAIN)
        wire.flush()
        late = await connected(address)
        late.add(mine.number, 1, FULL)
        late.flush()
        assert await mine.take() == [(1, FULL)]

    run(scenario)
