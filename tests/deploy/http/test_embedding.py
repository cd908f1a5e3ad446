"""The routes in an app of one's own: as the page shows it, and over the least that will do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from offramp.deploy.http.http_app import create_app
from offramp.worker.engine.service import EngineService

ROOT = Path(__file__).parents[3]
BODY = {"model": "mine", "prompt": "import os", "max_tokens": 4}


class OwnWorker:
    """What somebody who embeds the routes may already have."""

    model_id = "mine"

    def __init__(self, service: EngineService, **more: Any) -> None:
        self.service = service
        self.__dict__.update(more)


def test_what_the_page_shows_answers(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    made: dict[str, Any] = {}
    exec(block, made)
    try:
        reply = ask(
            made["app"],
            lambda client: client.post("/v1/completions", json={**BODY, "model": "reference"}),
        )
    finally:
        made["service"].stop()
    assert reply.json()["usage"]["completion_tokens"] == 4


def test_a_service_and_a_name_are_enough(service: EngineService, ask: Any) -> None:
    async def each(client: httpx.AsyncClient) -> list[httpx.Response]:
        paths = ("/v1/models", "/v1/policy", "/metrics", "/health", "/ready")
        return [
            await client.post("/v1/completions", json=BODY),
            *[await client.get(path) for path in paths],
        ]

    replies = ask(create_app(OwnWorker(service)), each)
    assert [reply.status_code for reply in replies] == 6 * [200]
    assert replies[1].json()["data"][0]["id"] == "mine"
    assert replies[2].json()["generation"] == 7  # what the engine runs, see conftest


def test_a_key_that_is_there_is_asked_for(service: EngineService, ask: Any) -> None:
    async def each(client: httpx.AsyncClient) -> list[int]:
        statuses = []
        for key in ("", "Bearer other", "Bearer sesame"):
            headers = {"Authorization": key}
            reply = await client.post("/v1/completions", json=BODY, headers=headers)
            statuses.append(reply.status_code)
        return statuses

    assert ask(create_app(OwnWorker(service, api_key="sesame")), each) == [401, 401, 200]
    assert ask(create_app(OwnWorker(service, api_key=None)), each) == [200, 200, 200]
