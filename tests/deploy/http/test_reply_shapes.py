"""What JSON and the proxies in between need of a reply: numbers, names, headers, counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.reply import Reply, _line
from offramp.deploy.http.shapes.replies import ChatStyle, CompletionStyle, ReplyStyle
from offramp.deploy.http.shapes.token_texts import legacy_logprobs, token_namer
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.service import EngineService
from support.models import make_model

BODY = {"model": "reference", "prompt": [11, 12], "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def broken_head(engine: AdaptiveEngine, stand_in: Any) -> Iterator[FastAPI]:
    """A model one of whose logits is always NaN."""
    model = make_model("llama", vocab_size=4096, tie_word_embeddings=False)
    model.lm_head.weight[7] = float("nan")
    service = EngineService(AdaptiveEngine(model, engine.tokenizer))
    service.start()
    yield create_app(stand_in(service))
    service.stop()


def strictly(text: str) -> Any:
    def no_number(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=no_number)


def streamed(app: FastAPI, ask: Callable[..., Any], **fields: Any) -> httpx.Response:
    body = {**BODY, "stream": True, **fields}
    response: httpx.Response = ask(app, lambda client: client.post("/v1/completions", json=body))
    assert response.status_code == 200, response.text
    return response


def chunks(response: httpx.Response) -> list[Any]:
    *lines, _, _ = response.text.split("\n\n")
    return [strictly(line.removeprefix("data: ")) for line in lines]


def test_logits_that_are_nan_have_logprobs_that_json_can_hold(
    broken_head: FastAPI, ask: Callable[..., Any]
) -> None:
    body = {**BODY, "logprobs": 2}
    whole = ask(broken_head, lambda client: client.post("/v1/completions", json=body))
    assert whole.status_code == 200, whole.text
    block = strictly(whole.text)["choices"][0]["logprobs"]
    assert block["token_logprobs"] == [-9999.0] * 3
    for chunk in chunks(streamed(broken_head, ask, logprobs=2)):
        assert chunk["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_logprob_is_beyond_json(value: str) -> None:
    event = TokenEvent("r", 2, "b", 3, 0, None, float(value), ((1, float(value)), (2, -0.5)), 5)
    block = legacy_logprobs([event], str)
    assert block["token_logprobs"] == [-9999.0]
    assert block["top_logprobs"] == [{"1": -9999.0, "2": -0.5}]
    json.dumps(block, allow_nan=False)


def test_names_keep_the_space_that_a_text_would_begin_without() -> None:
    words = ["<unk>", "▁the", "the", "▁"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    name = token_namer(tokenizer)
    assert tokenizer.decode([1]) == tokenizer.decode([2]) == "the"
    assert [name(token) for token in (1, 2, 3)] == [" the", "the", " "]


def test_proxies_are_told_to_pass_events_on(app: FastAPI, ask: Callable[..., Any]) -> None:
    headers = streamed(app, ask).headers
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"


def test_usage_is_null_until_the_last_chunk_if_asked_for(
    app: FastAPI, ask: Callable[..., Any]
) -> None:
    *before, last = chunks(streamed(app, ask, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in before] == [None] * 3
    assert last["usage"]["completion_tokens"] == 3
    assert all("usage" not in chunk for chunk in chunks(streamed(app, ask)))


COMMON: dict[str, Any] = {"id": "x", "created": 1, "model": 'a "model"', "prompt_tokens": 2}


@pytest.mark.parametrize(
    "style",
    [
        CompletionStyle(**COMMON),
        CompletionStyle(**COMMON, counts=True),
        CompletionStyle(**COMMON, prompt_only=True),
        CompletionStyle(**COMMON, stats=True),
        ChatStyle(**COMMON),
        ChatStyle(**COMMON, counts=True),
    ],
)
def test_what_is_encoded_once_for_all_chunks_says_what_each_would(style: ReplyStyle) -> None:
    reply = Reply(style, 2, events=None)  # type: ignore[arg-type]  # none are waited for
    texts = ("first", 'a "quote"\n', "", "ü\u2028\\", "last")
    for place, text in enumerate(texts):
        for index in (0, 1):
            event = TokenEvent("x", place, text, 3 + index, 0, None, text_offset=place)
            if text == "last":
                event = event._replace(finish_reason="length")
            expected = _line(style.chunk(index, event, first=not place))
            assert reply._chunks([(index, event)]) == expected
