"""Conversations over HTTP, by the model's own template and with the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from offramp.deploy.http.http_app import create_app
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.energy.step_meter import BusyCores
from offramp.worker.energy.track_meter import TrackMeter
from offramp.worker.engine.service import EngineService
from support.models import make_model
from support.tokenizers import byte_level_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]
RENDERED = "<|start|>system:be brief<|end|><|start|>user:hé<|end|><|start|>assistant:"
CONTEXT = 256
BODY = {"model": "chatty", "messages": MESSAGES, "max_completion_tokens": 5, "temperature": 0}

Send = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def chatty() -> AdaptiveEngine:
    tokenizer = byte_level_tokenizer("<|start|>")
    tokenizer.chat_template = TEMPLATE
    model = make_model("llama", vocab_size=258, max_position_embeddings=CONTEXT)
    return AdaptiveEngine(model, tokenizer, slots=4)


@pytest.fixture(scope="module")
def chat_app(chatty: AdaptiveEngine, stand_in: Any) -> Iterator[FastAPI]:
    service = EngineService(chatty, around=TrackMeter(chatty, BusyCores(), lambda: iter(())))
    service.start()
    worker = stand_in(service)
    worker.model_id = "chatty"
    yield create_app(worker)
    service.stop()


@pytest.fixture
def send(chat_app: FastAPI, ask: Callable[..., Any]) -> Send:
    def send(path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        body = {**BODY, **fields}
        response: httpx.Response = ask(chat_app, lambda client: client.post(path, json=body))
        return response

    return send


@pytest.fixture(scope="module")
def expected(chatty: AdaptiveEngine) -> Any:
    """The same without HTTP: the text that the template makes, encoded as it stands."""
    tokens = chatty.tokenizer.encode(RENDERED, add_special_tokens=False)
    other = AdaptiveEngine(chatty.model, chatty.tokenizer)
    return other.generate([tokens], SamplingParams(max_tokens=5, logprobs=2))[0]


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_reply_has_openais_shape(send: Send, expected: Any) -> None:
    body = send().json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": "chatty",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": expected.stats.prompt_tokens,
            "completion_tokens": 5,
            "total_tokens": expected.stats.prompt_tokens + 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions"], ids=["chat", "completions"]
)
def test_each_choice_is_told_its_energy_with_its_method_at_its_end(send: Send, path: str) -> None:
    length = {"max_tokens": 5, "max_completion_tokens": None}
    asked = {**length, "prompt": RENDERED, "n": 2, "offramp": {"stats": True}}
    whole = [each["offramp"] for each in send(path, **asked).json()["choices"]]
    lines = send(path, stream=True, **asked).text.split("\n\n")[:-2]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    told = [each["offramp"] for each in chunks if "energy" in each["offramp"]]
    assert [bool(each["choices"][0]["finish_reason"]) for each in chunks].count(True) == len(told)
    for each in (*whole, *told):
        energy = each["energy"]
        assert (energy["method"], energy["source"]) == ("modelled", "3 W per busy core")
        assert energy["joules"] > 0
        assert 0 < energy["read_share"] <= 1
    assert len(whole) == len(told) == 2


def test_the_older_name_and_parts_of_text_are_taken(send: Send, expected: Any) -> None:
    assert said(send(max_completion_tokens=None, max_tokens=5)) == expected.text
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "é"}]
    tokens = send("/tokenize", messages=[{"role": "user", "content": parts}]).json()["tokens"]
    lines = send("/tokenize", messages=[{"role": "user", "content": "h\né"}]).json()["tokens"]
    assert tokens == lines


def test_without_a_bound_a_reply_fills_the_context(send: Send) -> None:
    usage = send(max_completion_tokens=None, ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == CONTEXT


def test_logprobs_are_per_token_with_the_likeliest(send: Send, expected: Any) -> None:
    [choice] = send(logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [each["logprob"] for each in content] == pytest.approx(expected.logprobs, abs=1e-4)
    for each, top in zip(content, expected.top_logprobs, strict=True):
        assert bytes(each["bytes"]).decode() == each["token"]
        values = [one["logprob"] for one in each["top_logprobs"]]
        assert values == pytest.approx([value for _, value in top], abs=1e-4)
    assert send(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stream_says_who_speaks_once(send: Send, expected: Any) -> None:
    asked = {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "logprobs": True}
    *lines, done, _ = send(**asked).text.split("\n\n")
    assert done == "data: [DONE]"
    *chunks, usage = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        deltas = [choice["delta"] for choice in own]
        assert ["role" in delta for delta in deltas] == [True] + [False] * 4
        assert "".join(delta["content"] for delta in deltas) == expected.text
        assert [choice["finish_reason"] for choice in own] == [None] * 4 + ["length"]
        assert all(len(choice["logprobs"]["content"]) == 1 for choice in own)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "prompt"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(
    send: Send, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = send(**fields, stream=stream)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "no robots" not in error["message"]


def test_a_model_without_a_template_says_so(app: FastAPI, ask: Callable[..., Any]) -> None:
    body = {**BODY, "model": "reference"}
    response = ask(app, lambda client: client.post("/v1/chat/completions", json=body))
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_openais_client_converses(chat_app: FastAPI, expected: Any) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(chat_app)) as http:
            client = openai.AsyncOpenAI(
                base_url="http://offramp/v1",
                api_key="any-key",
                http_client=http,  # type: ignore[arg-type]  # httpx's serves, typed as httpx2's
                max_retries=0,
            )
            asked: dict[str, Any] = {k: v for k, v in BODY.items() if k != "stream"}
            whole = await client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == expected.text
            stream = await client.chat.completions.create(**asked, stream=True)
            texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(texts) == expected.text
            with pytest.raises(openai.BadRequestError) as bad:
                await client.chat.completions.create(**{**asked, "messages": []})
            assert bad.value.param == "messages"

    asyncio.run(scenario())
