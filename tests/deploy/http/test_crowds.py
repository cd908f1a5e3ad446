"""Many requests at once: each has a place or is refused before it is parsed and encoded."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.json_size import KEY_VALUES, json_values
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.shapes.chat_contract import MOST_MESSAGES
from offramp.deploy.http.shapes.offramp_options import MOST_FIELDS
from offramp.worker.engine.service import EngineService

ROOM = 3
"""Two slots and one place in line; see ``conftest``."""

MESSAGE = {"role": "user", "content": "a"}
PARTS = (MOST_MESSAGES + 1) * [{"type": "text", "text": "a"}]

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


def test_a_body_of_more_values_than_is_good_for_others_is_not_parsed(
    service: EngineService, stand_in: type, ask: Any
) -> None:
    app = create_app(stand_in(service), HttpLimits(body_values=40))
    text = json.dumps({**BODY, "prompt": '[1, "2"], \\ {"a": 3}, ' * 10})
    ids = json.dumps({**BODY, "prompt": [7] * 40})

    async def each(client: httpx.AsyncClient) -> list[httpx.Response]:
        as_json = {"content-type": "application/json"}
        asked = [("/v1/completions", text), ("/v1/completions", ids)]
        asked += [("/detokenize", json.dumps({"tokens": [7] * 40}))]
        return [await client.post(path, content=body, headers=as_json) for path, body in asked]

    served, *refused = ask(app, each)
    assert served.status_code == 200, served.text
    for reply in refused:
        assert reply.status_code == 413
        assert "more than 40 JSON values" in reply.json()["error"]["message"]


@given(values=st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_no_fewer_values_are_counted_than_there_are(values: Any) -> None:
    def number(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + sum(KEY_VALUES + number(each) for each in value.values())
        return 1 + (sum(map(number, value)) if isinstance(value, list) else 0)

    counted = json_values(json.dumps(values, ensure_ascii=False).encode())
    # An empty list or object counts as if something were in it, but for the one at the top.
    assert number(values) <= counted <= 2 * number(values)


@pytest.mark.parametrize(
    "prompt",
    [[1, "a"], [["a"]], [[[1]]], [{}], 7, [True], [1.5], [[1], "a"], [[1], [1.5]], [1, math.nan],
     [math.inf]],
)  # fmt: skip
def test_prompts_of_no_known_kind_are_refused_with_one_sentence(
    app: FastAPI, ask: Any, prompt: Any
) -> None:
    async def send(client: httpx.AsyncClient) -> httpx.Response:
        content = json.dumps({**BODY, "prompt": prompt})  # httpx itself would refuse NaN
        as_json = {"content-type": "application/json"}
        return await client.post("/v1/completions", content=content, headers=as_json)

    reply = ask(app, send)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("path", "changed", "param"),
    [
        ("/v1/completions", {"logit_bias": {"5": True}}, "logit_bias"),
        ("/v1/completions", {"stop_token_ids": [5, True]}, "stop_token_ids"),
        ("/v1/completions", {f"x{number}": 1 for number in range(MOST_FIELDS)}, None),
        (
            "/v1/completions",
            {"offramp": dict.fromkeys(map(str, range(2 * MOST_FIELDS)))},
            "offramp",
        ),
        ("/v1/chat/completions", {"messages": (MOST_MESSAGES + 1) * [MESSAGE]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PARTS}]}, "messages"),
        ("/tokenize", {"prompt": None, "messages": (MOST_MESSAGES + 1) * [MESSAGE]}, "messages"),
        ("/detokenize", {"tokens": [5, True]}, "tokens"),
    ],
)
def test_what_takes_long_to_check_is_refused_at_once(
    app: FastAPI, ask: Any, path: str, changed: dict[str, Any], param: str | None
) -> None:
    async def send(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(path, json={**BODY, **changed})

    reply = ask(app, send)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert len(reply.text) < 500


def test_token_ids_may_be_written_as_whole_numbers(app: FastAPI, ask: Any) -> None:
    async def send(client: httpx.AsyncClient) -> list[Any]:
        prompts = ([5, 6], [5.0, 6], [[5.0, 6.0]])
        asked = [{**BODY, "temperature": 0, "prompt": prompt} for prompt in prompts]
        replies = [await client.post("/v1/completions", json=each) for each in asked]
        return [each.json()["choices"][0]["text"] for each in replies]

    assert len(set(ask(app, send))) == 1
