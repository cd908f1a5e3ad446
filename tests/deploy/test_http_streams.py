"""Streams in trouble, a full line, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from offramp.controller.errors import RequestError
from offramp.deploy.http.http_app import create_app
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.service import EngineService

PROMPT = "def main():\n"
BODY = {"model": "reference", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}


@pytest.fixture
def greedy(engine: AdaptiveEngine) -> Callable[[int], str]:
    other = AdaptiveEngine(engine.model, engine.tokenizer)

    def greedy(count: int) -> str:
        sampling = SamplingParams(max_tokens=count)
        return other.generate(PROMPT, sampling, engine.current_policy())[0].text

    return greedy


@contextmanager
def held(engine: AdaptiveEngine) -> Iterator[None]:
    """While this is open, the engine admits nothing and emits nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", lambda *_: [])
        yield


async def settle(service: EngineService) -> None:
    """Returns once every earlier command was obeyed: they are taken in order."""
    with pytest.raises(RequestError):
        await service.submit([], SamplingParams())


def test_a_full_line_is_told_to_come_back(
    app: FastAPI, ask: Any, engine: AdaptiveEngine, service: EngineService
) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        with held(engine):
            waiting = [
                asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(3)
            ]
            while engine.load != (0, 3):
                await asyncio.sleep(0)
            refused = await client.post("/v1/completions", json={**BODY, "stream": True})
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "overloaded_error"
        for response in await asyncio.gather(*waiting):
            assert response.json()["usage"]["completion_tokens"] == 6
        await settle(service)
        assert (await client.get("/ready")).status_code == 200

    ask(app, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_an_error_response(
    app: FastAPI, ask: Any, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def explode(*_: Any) -> Any:
        raise MemoryError("no room")

    body = {**BODY, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "prefill", explode)
        response = ask(app, lambda client: client.post("/v1/completions", json=body))
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "decode_failed"
    assert "no room" not in response.text
    again = ask(app, lambda client: client.post("/v1/completions", json=body))
    assert again.status_code == 200


def test_a_failure_in_mid_stream_is_an_event_and_then_the_end(
    app: FastAPI, ask: Any, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, seen = engine.decoder.launch, []

    def explode_later(rows: Any, *stage: Any) -> Any:
        seen.append(rows)
        if len(seen) == 3:
            raise MemoryError("no room")
        return launch(rows, *stage)

    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "launch", explode_later)
        response = ask(app, lambda client: client.post("/v1/completions", json=body))
    *tokens, error, done, end = response.text.split("\n\n")
    assert len(tokens) == 3
    assert all("choices" in token for token in tokens)
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "decode_failed"
    assert (done, end) == ("data: [DONE]", "")


def test_a_bug_is_told_in_json_and_without_its_details(
    app: FastAPI, ask: Any, service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("private")

    with monkeypatch.context() as patch:
        patch.setattr(service, "submit_all", bug)
        response = ask(app, lambda client: client.post("/v1/completions", json=BODY))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "private" not in response.text


def test_a_stuck_engine_is_reported(
    app: FastAPI, ask: Any, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(EngineService, "is_healthy", property(lambda _: False))
        for path in ("/health", "/ready"):
            assert ask(app, lambda client, path=path: client.get(path)).status_code == 503


def test_a_client_that_goes_away_frees_its_slot(app: FastAPI, service: EngineService) -> None:
    """Spoken in raw ASGI, since httpx's transport cannot hang up."""
    scope = {
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
    content = json.dumps({**BODY, "stream": True, "max_tokens": 1000}).encode()

    async def scenario() -> None:
        requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        requests.put_nowait({"type": "http.request", "body": content, "more_body": False})
        chunks = []

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                chunks.append(message["body"])
            if len(chunks) == 2:
                requests.put_nowait({"type": "http.disconnect"})

        await asyncio.wait_for(app(scope, requests.get, send), 60)
        assert 2 <= len(chunks) < 1000
        await settle(service)
        assert service.engine.load == (0, 0)

    asyncio.run(scenario())


def with_openai(
    app: FastAPI, use: Callable[[openai.AsyncOpenAI], Awaitable[Any]], key: str = "any-key"
) -> Any:
    async def within() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            client = openai.AsyncOpenAI(
                base_url="http://offramp/v1",
                api_key=key,
                http_client=http,  # type: ignore[arg-type]  # httpx's serves, typed as httpx2's
                max_retries=0,
            )
            return await asyncio.wait_for(use(client), 60)

    return asyncio.run(within())


def test_openais_client_completes(app: FastAPI, greedy: Callable[[int], str]) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["reference"]
        assert (await client.models.retrieve("reference")).owned_by == "offramp"
        answer = await client.completions.create(
            model="reference",
            prompt=PROMPT,
            max_tokens=9,
            temperature=0,
            stop=None,
            seed=None,
            extra_body={"offramp": {"stats": True}},
        )
        assert answer.object == "text_completion"
        assert answer.choices[0].text == greedy(9)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 9
        assert answer.model_extra is not None
        assert answer.model_extra["offramp"]["generation"] == 7

    with_openai(app, use)


def test_openais_client_streams(app: FastAPI, greedy: Callable[[int], str]) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(
            model="reference",
            prompt=PROMPT,
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, usage = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == greedy(9)
        assert [c.choices[0].finish_reason for c in chunks] == [None] * 8 + ["length"]
        assert usage.choices == []
        assert usage.usage is not None
        assert usage.usage.completion_tokens == 9

    with_openai(app, use)


def test_openais_client_raises_its_own_errors(service: EngineService, stand_in: Any) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        create = client.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="reference", prompt=PROMPT, n=2, best_of=1)
        assert bad.value.param == "best_of"
        with pytest.raises(openai.NotFoundError):
            await create(model="other", prompt=PROMPT)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").completions.create(
                model="reference", prompt=PROMPT
            )

    with_openai(create_app(stand_in(service, api_key="right-key")), use, key="right-key")


def test_openais_client_is_told_of_a_failure_in_mid_stream(
    app: FastAPI, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: Any) -> Any:
        raise MemoryError("no room")

    async def use(client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(model="reference", prompt=PROMPT, stream=True)
        with pytest.raises(openai.APIError, match="decoding failed"):
            [chunk async for chunk in stream]

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "launch", explode)
        with_openai(app, use)
