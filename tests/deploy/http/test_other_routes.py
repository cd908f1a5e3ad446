"""Everything but completions: texts and tokens, versions, HEAD, and what the schema promises."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi import FastAPI

from offramp.worker import AdaptiveEngine

TEXT = "def main():\n"

Call = Callable[..., httpx.Response]


@pytest.fixture
def call(app: FastAPI, ask: Callable[..., Any]) -> Call:
    def call(method: str, path: str, **options: Any) -> httpx.Response:
        response: httpx.Response = ask(app, lambda each: each.request(method, path, **options))
        return response

    return call


def test_text_becomes_tokens_and_text_again(call: Call, engine: AdaptiveEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)
    body = call("POST", "/tokenize", json={"model": "reference", "prompt": TEXT}).json()
    assert body == {"count": len(tokens), "max_model_len": 1024, "tokens": tokens}
    assert call("POST", "/detokenize", json={"tokens": tokens}).json() == {"prompt": TEXT}
    assert call("POST", "/tokenize", json={"prompt": ""}).json()["tokens"] == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {"prompt": "a" * 1_000_000}, 400),
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/detokenize", {"tokens": [4096]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": "a"}, 400),
        ("/detokenize", {}, 400),
    ],
)
def test_what_has_no_tokens_is_refused(
    call: Call, path: str, body: dict[str, Any], status: int
) -> None:
    response = call("POST", path, json=body)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_version_is_the_installed_one(call: Call) -> None:
    assert call("GET", "/version").json() == {"version": version("offramp")}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/reference", "/v1/policy", "/version", "/health", "/ready"]
)
def test_head_is_where_get_is(call: Call, path: str) -> None:
    get, head = call("GET", path), call("HEAD", path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


def test_head_is_not_where_get_is_not(call: Call) -> None:
    for path, status in (("/v1/completions", 405), ("/v1/nothing", 404)):
        response = call("HEAD", path)
        assert (response.status_code, response.content) == (status, b"")


def test_the_schema_describes_what_is_sent(call: Call) -> None:
    """Replies and errors of every route are valid by /openapi.json, which promises no 422."""
    schema = call("GET", "/openapi.json").json()
    asked = {"model": "reference", "prompt": TEXT, "max_tokens": 3, "n": 2}
    options = {"echo": True, "logprobs": 2, "offramp": {"stats": True}}
    calls: list[tuple[str, str, str, Any]] = [
        ("post", "/v1/completions", "/v1/completions", {**asked, **options}),
        ("post", "/v1/completions", "/v1/completions", {**asked, "prompt": 3}),
        ("post", "/v1/chat/completions", "/v1/chat/completions", {"model": "reference"}),
        ("post", "/tokenize", "/tokenize", {"prompt": TEXT}),
        ("post", "/detokenize", "/detokenize", {"tokens": [11]}),
        ("get", "/v1/models", "/v1/models", None),
        ("get", "/v1/models/reference", "/v1/models/{name}", None),
        ("get", "/v1/models/other", "/v1/models/{name}", None),
        ("get", "/version", "/version", None),
        ("get", "/v1/policy", "/v1/policy", None),
        ("get", "/health", "/health", None),
        ("get", "/-/healthz", "/-/healthz", None),
        ("get", "/ready", "/ready", None),
    ]
    for method, path, route, body in calls:
        response = call(method, path, json=body)
        promised = schema["paths"][route][method]["responses"]
        assert "422" not in promised
        status = str(response.status_code)
        found = promised.get(status) or promised[f"{status[0]}XX"]
        shape = {**found["content"]["application/json"]["schema"], **_definitions(schema)}
        jsonschema.Draft202012Validator(shape).validate(response.json())
    # Prometheus' text has a format of its own: see test_metrics.py.
    assert set(schema["paths"]) - {"/metrics"} == {route for _, _, route, _ in calls}


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {"components": schema["components"]}


def test_the_schema_says_no_more_than_is_true(call: Call) -> None:
    """The control: what a completion lacks is found out."""
    schema = call("GET", "/openapi.json").json()
    found = schema["paths"]["/v1/completions"]["post"]["responses"]["200"]
    shape = {**found["content"]["application/json"]["schema"], **_definitions(schema)}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(shape).validate({"id": "x"})
