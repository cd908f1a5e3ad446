"""A client that hangs up costs nothing more, whatever it waits for.

Spoken in raw ASGI, since httpx's transport cannot hang up.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.deploy.http.http_app import create_app
from offramp.worker.engine.service import EngineService

SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/v1/completions",
    "raw_path": b"/v1/completions",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"content-type", b"application/json")],
}
LONG = {"model": "reference", "prompt": [11, 12], "max_tokens": 1000, "temperature": 0}
PATIENCE_S = 60.0


class Caller:
    """One request to an app, from its first byte to the hanging up."""

    def __init__(self, app: FastAPI, **fields: Any) -> None:
        body = json.dumps({**LONG, "ignore_eos": True, **fields}).encode()
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.heard: list[Any] = []
        self._task = asyncio.create_task(app(SCOPE, self._said.get, self._hear))

    async def _hear(self, message: Any) -> None:
        self.heard.append(message)

    async def hang_up(self) -> None:
        """Returns when the app is done with the request."""
        self._said.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self._task, PATIENCE_S)


async def until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stream": True}])
def test_a_slot_is_free_at_once(
    app: FastAPI, service: EngineService, fields: dict[str, Any]
) -> None:
    async def scenario() -> None:
        start = service.tokens_emitted
        caller = Caller(app, **fields)
        await until(lambda: service.tokens_emitted >= start + 5)
        await caller.hang_up()
        await until(lambda: service.engine.load == (0, 0))
        assert service.tokens_emitted < start + 900
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://offramp"
        ) as client:
            counted = (await client.get("/metrics")).text
        assert f'finished_reason="abort",model_name="reference"}} {fields.get("n", 1)}.0' in counted

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_in_line_is_free_at_once(
    app: FastAPI, service: EngineService, stream: bool
) -> None:
    async def scenario() -> None:
        running = Caller(app, n=2)
        await until(lambda: service.engine.load == (2, 0))
        waiting = Caller(app, stream=stream)
        await until(lambda: service.engine.load == (2, 1))
        await waiting.hang_up()
        await until(lambda: service.engine.load == (2, 0))
        assert not [each for each in waiting.heard if each.get("status") == 200]
        await running.hang_up()
        await until(lambda: service.engine.load == (0, 0))

    asyncio.run(scenario())


def test_who_leaves_before_a_body_is_whole_takes_nobodys_place(app: FastAPI) -> None:
    async def scenario() -> Any:
        leaving: list[Any] = []
        for _ in range(100):
            said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            said.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
            said.put_nowait({"type": "http.disconnect"})
            leaving.append(asyncio.create_task(app(SCOPE, said.get, heard)))
        caller = Caller(app, max_tokens=3)
        await until(lambda: len(caller.heard) >= 2)
        await caller.hang_up()
        await asyncio.gather(*leaving)
        return caller.heard[0]["status"]

    async def heard(message: Any) -> None:
        raise AssertionError(message)

    assert asyncio.run(scenario()) == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_worker_has_accepted_is_given_up_at_once(
    service: EngineService, stand_in: type, stream: bool
) -> None:
    """As while its worker is busy with something else, or frozen."""
    asked, given_up = asyncio.Event(), asyncio.Event()

    async def never(*_: Any, **__: Any) -> None:
        asked.set()
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            given_up.set()

    async def scenario() -> None:
        backend = stand_in(service)
        backend.submit_all = never
        caller = Caller(create_app(backend), stream=stream)
        await asked.wait()
        await caller.hang_up()
        assert given_up.is_set()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S / 2))


def test_a_client_that_stays_gets_its_answer(app: FastAPI, service: EngineService) -> None:
    async def scenario() -> None:
        caller = Caller(app, max_tokens=3)
        await until(lambda: len(caller.heard) >= 2)
        await caller.hang_up()
        start, body = caller.heard[:2]
        assert start["status"] == 200
        assert json.loads(body["body"])["usage"]["completion_tokens"] == 3

    asyncio.run(scenario())
