"""Requests have names, and are written down under them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from offramp.deploy.http.http_app import create_app
from offramp.worker.engine.service import EngineService

KEY = "secret-key"
BODY = {"model": "reference", "prompt": [11, 12], "max_tokens": 2, "stream": True}


@pytest.fixture
def logged(service: EngineService, stand_in: Any, ask: Any, tmp_path: Path) -> Any:
    """Sends requests; returns the replies' ids, and the lines that were written."""
    file = tmp_path / "logs" / "access.jsonl"
    app = create_app(stand_in(service, api_key=KEY), access_log=file)

    def logged(*requests: tuple[str, str, dict[str, str]]) -> tuple[list[str], list[Any]]:
        async def send(client: httpx.AsyncClient) -> list[str]:
            names = []
            for method, path, headers in requests:
                body = BODY if method == "POST" else None
                reply = await client.request(method, path, json=body, headers=headers)
                names.append(reply.headers["x-request-id"])
            return names

        names: list[str] = ask(app, send)
        return names, [json.loads(line) for line in file.read_text().splitlines()]

    return logged


def test_each_request_is_a_line(logged: Any) -> None:
    right = {"authorization": f"Bearer {KEY}"}
    names, lines = logged(
        ("POST", "/v1/completions", {**right, "x-request-id": "mine"}),
        ("POST", "/v1/completions", {"authorization": "Bearer another"}),
        ("GET", "/health", {}),
        ("HEAD", "/v1/nothing", right),
    )
    assert names[0] == "mine"
    assert len(set(names)) == 4
    assert [line["request_id"] for line in lines] == names
    assert [line["status"] for line in lines] == [200, 401, 200, 404]
    assert [line["client"] for line in lines] == ["OFFRAMP_API_KEY", None, None, "OFFRAMP_API_KEY"]
    assert [line["method"] for line in lines] == ["POST", "POST", "GET", "HEAD"]
    assert lines[0]["path"] == "/v1/completions"
    assert all(line["seconds"] > 0 for line in lines)
    assert KEY not in json.dumps(lines)


@pytest.mark.parametrize("name", ["", "two words", 129 * "a", 'a"\t}'])
def test_a_name_that_is_none_is_replaced(logged: Any, name: str) -> None:
    (given,), (line,) = logged(("GET", "/health", {"x-request-id": name}))
    assert given == line["request_id"]
    assert given != name
    assert given.isalnum()
