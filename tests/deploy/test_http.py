"""The HTTP contract over a real engine: what is answered, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.deploy.http.http_app import create_app
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.service import EngineService

PROMPT = "def main():\n"
BODY = {"model": "reference", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}

Post = Callable[..., httpx.Response]
Get = Callable[..., httpx.Response]


@pytest.fixture
def post(app: FastAPI, ask: Any) -> Post:
    """Posts a completion request: an object, or the text of one."""

    def post(body: Any, app: FastAPI = app, **options: Any) -> httpx.Response:
        if isinstance(body, str | bytes):
            options |= {"content": body, "headers": {"content-type": "application/json"}}
        else:
            options["json"] = body
        response: httpx.Response = ask(
            app, lambda client: client.post("/v1/completions", **options)
        )
        return response

    return post


@pytest.fixture
def get(app: FastAPI, ask: Any) -> Get:
    def get(path: str, app: FastAPI = app, **options: Any) -> httpx.Response:
        response: httpx.Response = ask(app, lambda client: client.get(path, **options))
        return response

    return get


@pytest.fixture(scope="module")
def expected(engine: AdaptiveEngine) -> Any:
    """The same completion without HTTP, from an engine of its own."""
    other = AdaptiveEngine(engine.model, engine.tokenizer)
    return other.generate(PROMPT, SamplingParams(max_tokens=6), engine.current_policy())[0]


def events_of(response: httpx.Response) -> list[Any]:
    """The SSE events; every line must be one, and the last must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = response.text.split("\n\n")
    assert end == ""
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def refused(response: httpx.Response, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert isinstance(error["message"], str)
    return error["message"]


def test_a_completion_has_the_shape_of_openais(post: Post, expected: Any) -> None:
    response = post(BODY)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "reference",
        "choices": [
            {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}
        ],
        "usage": {
            "prompt_tokens": expected.stats.prompt_tokens,
            "completion_tokens": 6,
            "total_tokens": expected.stats.prompt_tokens + 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_the_defaults_are_openais(post: Post) -> None:
    first, second = (post({"model": "reference", "prompt": [11, 12]}).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] <= 16
    assert first["choices"][0]["text"] != second["choices"][0]["text"]  # temperature 1, no seed


def test_a_stream_has_one_event_per_token(post: Post, expected: Any) -> None:
    chunks = events_of(post({**BODY, "stream": True}))
    assert len(chunks) == 6
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * 5 + ["length"]
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk
        assert "offramp" not in chunk


def test_usage_comes_last_and_only_if_asked_for(post: Post, expected: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage = events_of(post({**BODY, **options}))
    assert len(chunks) == 6
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["usage"]["prompt_tokens"] == expected.stats.prompt_tokens


def test_exit_statistics_are_opt_in(post: Post, expected: Any) -> None:
    asked = {**BODY, "offramp": {"stats": True}}
    assert "offramp" not in post(BODY).json()
    assert post(asked).json()["offramp"] == {
        "generation": 7,
        "exit_layers": [12, 6, 6, 6, 6, 6],
        "mean_exit_layer": 7.0,
        "layer_calls": 30,
        "copy_calls": 0,
        "prompt_calls": 12 * expected.stats.prompt_tokens,
        "exact_share": expected.stats.exact_share,
        "drafts": 0,
        "drafts_accepted": 0,
        "energy": None,  # nobody reads any here
    }
    chunks = events_of(post({**asked, "stream": True}))
    assert [chunk["offramp"]["token"] for chunk in chunks] == expected.token_ids
    assert [chunk["offramp"]["exit_layer"] for chunk in chunks] == [12, 6, 6, 6, 6, 6]
    assert {chunk["offramp"]["generation"] for chunk in chunks} == {7}


def test_token_ids_and_a_list_of_one_are_prompts_too(post: Post, engine: Any) -> None:
    text = post(BODY).json()["choices"]
    assert post({**BODY, "prompt": engine.tokenizer.encode(PROMPT)}).json()["choices"] == text
    assert post({**BODY, "prompt": [PROMPT]}).json()["choices"] == text


def test_unknown_fields_and_nulls_are_accepted(post: Post, expected: Any) -> None:
    extra = {"user": "me", "top_k": 3, "metadata": {"a": [1]}, "min_p": None}
    neutral: dict[str, Any] = {
        "n": 1,
        "echo": False,
        "logprobs": None,
        "stop": [],
        "logit_bias": {},
    }
    nulls = dict.fromkeys(("top_p", "seed", "stream", "stream_options", "offramp", "best_of"))
    response = post({**BODY, **extra, **neutral, **nulls})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == expected.text
    absent = post({**BODY, "max_tokens": None, "temperature": None})
    assert absent.json()["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(("field", "value"), [("suffix", "end")])
def test_what_is_not_supported_is_refused_and_not_dropped(
    post: Post, field: str, value: Any
) -> None:
    message = refused(post({**BODY, field: value}), 400, field)
    assert "not supported" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", 10**30),
        ("max_tokens", 1024),
        ("seed", -2),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stream", "perhaps"),
        ("stream_options", 3),
        ("offramp.speed", {"stats": True, "speed": 11}),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", 5),
        ("prompt", None),
        ("prompt", ["a", ""]),
        ("prompt", [[1, 2], []]),
        ("prompt", ["a"] * 129),
        ("prompt", [[]]),
        ("prompt", [["a"]]),
        ("prompt", [[4096]]),
        ("prompt", [1, "a"]),
        ("prompt", [1.5]),
        ("prompt", [4096]),
        ("prompt", [-1]),
        ("prompt", [10**30]),
        ("model", None),
        ("model", 3),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_names_its_field(post: Post, field: str, value: Any, stream: bool) -> None:
    asked = {**BODY, "stream": stream, field.partition(".")[0]: value}
    message = refused(post(asked), 400, field)
    assert message.startswith(field)
    assert "\n" not in message


def test_a_prompt_beyond_the_context_is_refused(post: Post) -> None:
    message = refused(post({**BODY, "prompt": [1] * 2000}), 400, "prompt")
    assert "2000 tokens" in message
    assert "1024" in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "max_tokens", "seed", "frequency_penalty"]
)
def test_numbers_that_are_none_are_refused(post: Post, field: str, number: str) -> None:
    content = json.dumps({**BODY, field: "?"}).replace('"?"', number)
    refused(post(content), 400, field)


@pytest.mark.parametrize("top_p", [1.0, 1e-300])
@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_extreme_sampling_ends_no_stream(post: Post, temperature: float, top_p: float) -> None:
    response = post({**BODY, "temperature": temperature, "top_p": top_p})
    assert response.status_code == 200, response.text


def test_half_a_surrogate_pair_is_refused(post: Post) -> None:
    content = json.dumps({**BODY, "prompt": "?"}).replace('"?"', '"a\\ud800"')
    assert "surrogate" in refused(post(content), 400, "prompt")
    content = json.dumps({**BODY, "model": "?"}).replace('"?"', '"a\\ud800"')
    refused(post(content), 404, None)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", "\x00", b"\xff\xfe{", "[" * 100_000]
)
def test_what_is_no_json_object_is_refused(post: Post, content: str | bytes) -> None:
    refused(post(content), 400, None)


def test_another_model_is_not_found(post: Post) -> None:
    message = refused(post({**BODY, "model": "gpt-4"}), 404, None)
    assert "'gpt-4'" in message
    assert "'reference'" in message


def test_unknown_routes_and_methods_are_told_in_json(get: Get) -> None:
    refused(get("/v1/nothing"), 404, None)
    refused(get("/v1/completions"), 405, None)


def test_models_and_policy_are_readable(get: Get) -> None:
    card = {"id": "reference", "object": "model", "created": 1_800_000_000, "owned_by": "offramp"}
    assert get("/v1/models").json() == {"object": "list", "data": [card]}
    assert get("/v1/models/reference").json() == card
    refused(get("/v1/models/other"), 404, None)
    assert get("/v1/policy").json()["generation"] == 7


def test_a_model_may_have_a_slash_in_its_name(
    get: Get, service: EngineService, stand_in: Any
) -> None:
    worker = stand_in(service)
    worker.model_id = "org/model"
    assert get("/v1/models/org/model", create_app(worker)).json()["id"] == "org/model"


def test_a_key_is_asked_for_except_by_the_probes(
    post: Post, get: Get, service: EngineService, stand_in: Any
) -> None:
    app = create_app(stand_in(service, api_key="secret-key"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-key"}):
        refused(post(BODY, app, headers=headers), 401, None)
        for path in ("/v1/models", "/v1/policy", "/v1/nothing", "/openapi.json"):
            refused(get(path, app, headers=headers), 401, None)
        for path in ("/health", "/ready"):
            assert get(path, app, headers=headers).status_code == 200
    right = {"authorization": "Bearer secret-key"}
    assert post(BODY, app, headers=right).status_code == 200
    assert get("/v1/models", app, headers=right).status_code == 200
