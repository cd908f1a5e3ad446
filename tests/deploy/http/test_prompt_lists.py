"""Several prompts at once, prompts with their log-probabilities, and the best of several."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from offramp.deploy.http.http_app import create_app
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.service import EngineService

TEXTS = ["def main():\n", "import os\n\nclass"]
BODY = {"model": "reference", "prompt": TEXTS, "max_tokens": 6, "temperature": 0}

Send = Callable[..., httpx.Response]


@pytest.fixture
def send(service: EngineService, stand_in: Any, ask: Callable[..., Any]) -> Send:
    app: FastAPI = create_app(stand_in(service))

    def send(**fields: Any) -> httpx.Response:
        body = {**BODY, **fields}
        response: httpx.Response = ask(app, lambda each: each.post("/v1/completions", json=body))
        return response

    return send


@pytest.fixture(scope="module")
def service(engine: AdaptiveEngine) -> Any:
    service = EngineService(engine, max_waiting=16)
    service.start()
    yield service
    service.stop()


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    assert [choice["index"] for choice in found] == list(range(len(found)))
    return found


def test_choices_come_in_the_order_of_the_prompts(send: Send, engine: AdaptiveEngine) -> None:
    alone = [choices(send(prompt=text))[0]["text"] for text in TEXTS]
    ids = [engine.tokenizer.encode(text) for text in TEXTS]
    for prompts in (TEXTS, ids):
        both = send(prompt=prompts)
        assert [choice["text"] for choice in choices(both)] == alone
        usage = both.json()["usage"]
        assert usage["prompt_tokens"] == sum(map(len, ids))
        assert usage["completion_tokens"] == 12
    twice = choices(send(n=2))
    assert [choice["text"] for choice in twice] == [alone[0], alone[0], alone[1], alone[1]]


def test_a_stream_of_several_prompts_names_its_choices(send: Send) -> None:
    expected = [choice["text"] for choice in choices(send())]
    *lines, done, _ = send(stream=True).text.split("\n\n")
    assert done == "data: [DONE]"
    texts = ["", ""]
    for line in lines:
        [choice] = json.loads(line.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_one_bad_prompt_leaves_nothing_behind(send: Send, service: EngineService) -> None:
    response = send(prompt=[[11, 12], [4096]])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert service.engine.load == (0, 0)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_the_logprobs_of_a_forward_pass(
    send: Send, engine: AdaptiveEngine, max_tokens: int, stream: bool
) -> None:
    """As lm-eval asks for likelihoods: echo, logprobs, and no or one token more."""
    asked = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "stream": stream}
    response = send(prompt=TEXTS[1], **asked)
    if stream:
        first, *_ = response.text.split("\n\n")
        [choice] = json.loads(first.removeprefix("data: "))["choices"]
        made = min(max_tokens, 1)
    else:
        [choice] = choices(response)
        made = max_tokens
        assert response.json()["usage"]["completion_tokens"] == max_tokens
    tokens = engine.tokenizer.encode(TEXTS[1])
    with torch.inference_mode():
        logits_TV = engine.model(torch.tensor([tokens])).logits[0]
    expected = logits_TV.float().log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])
    block = choice["logprobs"]
    assert all(len(column) == len(tokens) + made for column in block.values())
    assert block["token_logprobs"][0] is block["top_logprobs"][0] is None
    found = block["token_logprobs"][1 : len(tokens)]
    assert found == pytest.approx(expected[:, 0].tolist(), abs=1e-3)
    for value, top in zip(block["token_logprobs"][1:], block["top_logprobs"][1:], strict=True):
        assert value <= max(top.values())
    offsets = block["text_offset"]
    for name, start in zip(block["tokens"][: len(tokens)], offsets, strict=False):
        assert TEXTS[1][start:].startswith(name)
    assert offsets[len(tokens) :][:1] == [len(TEXTS[1])][:made]
    if max_tokens == 0:
        assert choice["text"] == TEXTS[1]
        assert choice["finish_reason"] == "length"


def test_nothing_is_not_asked_for_without_echo(send: Send) -> None:
    response = send(max_tokens=0)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "max_tokens"


def test_the_best_of_several_are_the_likeliest(send: Send) -> None:
    hot = {"prompt": TEXTS[0], "temperature": 1.5, "seed": 5, "logprobs": 0, "ignore_eos": True}
    every = choices(send(n=4, **hot))
    mean = {each["text"]: sum(each["logprobs"]["token_logprobs"]) for each in every}
    assert len(mean) == 4
    ranked = sorted(mean, key=lambda text: -mean[text])
    best = send(n=2, best_of=4, **hot)
    assert [choice["text"] for choice in choices(best)] == ranked[:2]
    assert best.json()["usage"]["completion_tokens"] == 24
    unasked = choices(send(best_of=4, **{**hot, "logprobs": None}))
    assert [(each["text"], each["logprobs"]) for each in unasked] == [(ranked[0], None)]


@pytest.mark.parametrize("fields", [{"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}])
def test_a_best_of_that_cannot_be_is_refused(send: Send, fields: dict[str, Any]) -> None:
    response = send(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "best_of"
