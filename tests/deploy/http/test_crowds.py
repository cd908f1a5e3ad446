"""Many requests at once: each has a place or is refused before it is parsed and encoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from offramp.deploy.http.http_app import create_app
from offramp.worker.engine.service import EngineService

ROOM = 3
"""Two slots and one place in line; see ``conftest``."""

BODY = {"model": "reference", "prompt": "import os", "max_tokens": 8, "ignore_eos": True}


def test_what_finds_no_place_is_refused_before_any_work(
    service: EngineService, stand_in: type, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = stand_in(service)
    submitted = []
    submit_all = backend.submit_all

    async def counted(*request: Any, **options: Any) -> Any:
        submitted.append(request)
        return await submit_all(*request, **options)

    monkeypatch.setattr(backend, "submit_all", counted)

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = (client.post("/v1/completions", json=BODY) for _ in range(4 * ROOM))
        return await asyncio.gather(*asked)

    replies = ask(create_app(backend), crowd)
    assert sorted(each.status_code for each in replies) == ROOM * [200] + 3 * ROOM * [429]
    assert len(submitted) == ROOM
    assert all(each.headers["retry-after"] for each in replies if each.status_code == 429)


def test_a_body_that_is_still_coming_holds_no_place(
    service: EngineService, stand_in: type, ask: Any
) -> None:
    async def beside_slow_ones(client: httpx.AsyncClient) -> list[int]:
        all_is_said = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"{"
            await all_is_said.wait()
            yield b"}"

        coming = [
            asyncio.ensure_future(client.post("/v1/completions", content=slowly()))
            for _ in range(2 * ROOM)
        ]
        await asyncio.sleep(0)
        quick = await client.post("/v1/completions", json=BODY)
        all_is_said.set()
        return [quick.status_code, *(each.status_code for each in await asyncio.gather(*coming))]

    quick, *slow = ask(create_app(stand_in(service)), beside_slow_ones)
    assert quick == 200
    assert set(slow) <= {400, 429}
