"""Requests as clients of other servers write them: taken, or refused by name, never half done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.deploy.http.shapes.foreign_fields import NEUTRAL, OTHER_NAMES

BODY = {"model": "reference", "prompt": [11, 12], "max_tokens": 6, "temperature": 0}

Send = Callable[..., httpx.Response]


@pytest.fixture
def send(app: FastAPI, ask: Callable[..., Any]) -> Send:
    def send(**fields: Any) -> httpx.Response:
        body = {**BODY, **fields}
        response: httpx.Response = ask(app, lambda each: each.post("/v1/completions", json=body))
        return response

    return send


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -1},
        {"seed": -1},
        {"prompt": [[11, 12]]},
        {"stream_options": {"include_usage": None}},
        {"offramp": {"stats": None}},
    ],
)
def test_what_other_servers_take_is_taken(send: Send, fields: dict[str, Any]) -> None:
    assert text(send(**fields)) == text(send())


def test_a_seed_of_minus_one_is_none(send: Send) -> None:
    hot = {"temperature": 2.0, "max_tokens": 40, "ignore_eos": True, "seed": -1, "top_k": -1}
    assert text(send(**hot)) != text(send(**hot))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("allowed_token_ids", [65]),
        ("bad_words", ["a"]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("structured_outputs", {"choice": ["yes"]}),
        ("guided_regex", "a+"),
        ("guided_choice", ["yes", "no"]),
        ("regex", "a+"),
        ("grammar", "root ::= 'a'"),
        ("use_beam_search", True),
        ("num_beams", 4),
        ("prompt_logprobs", 0),
        ("truncate_prompt_tokens", 1),
        ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
        ("add_special_tokens", False),
        ("typical_p", 0.5),
        ("mirostat", 2),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_would_change_the_tokens_is_refused(
    send: Send, field: str, value: Any, stream: bool
) -> None:
    response = send(**{field: value, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(field)
    assert "not supported. Leave it out." in error["message"]


@pytest.mark.parametrize("other", sorted(OTHER_NAMES))
def test_another_name_is_told_ours(send: Send, other: str) -> None:
    response = send(**{other: 2})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == other
    assert f"Call it {OTHER_NAMES[other]}." in response.json()["error"]["message"]


def test_neutral_values_change_nothing(send: Send) -> None:
    assert text(send(**dict.fromkeys([*NEUTRAL, *OTHER_NAMES]))) == text(send())
    for place in range(2):
        chosen = {field: values[place] for field, values in NEUTRAL.items() if values[place:]}
        assert text(send(**chosen)) == text(send())
