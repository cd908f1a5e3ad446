"""The decoding options over HTTP: what each does, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from offramp.controller.errors import OverloadedError, RequestError
from offramp.deploy.http.shapes.token_texts import legacy_logprobs, token_namer
from offramp.worker import AdaptiveEngine, Completion, PolicySnapshot, SamplingParams
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.service import EngineService

PROMPT = "import os\n\ndef "
BODY = {"model": "reference", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}

Post = Callable[..., httpx.Response]
Generate = Callable[..., list[Completion]]


@pytest.fixture
def post(app: FastAPI, ask: Any) -> Post:
    def post(content: str | None = None, **fields: Any) -> httpx.Response:
        text = json.dumps({**BODY, **fields}) if content is None else content
        headers = {"content-type": "application/json"}
        response: httpx.Response = ask(
            app, lambda client: client.post("/v1/completions", content=text, headers=headers)
        )
        return response

    return post


@pytest.fixture(scope="module")
def generate(engine: AdaptiveEngine) -> Generate:
    """The same completions without HTTP, from an engine of its own."""
    other = AdaptiveEngine(engine.model, engine.tokenizer)

    def generate(**options: Any) -> list[Completion]:
        sampling = SamplingParams(**{"max_tokens": 12} | options)
        return other.generate(PROMPT, sampling, engine.current_policy())

    return generate


def choices_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *lines, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 1.4},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.5, "seed": 3, "top_k": 2},
        {"temperature": 1.5, "seed": 3, "min_p": 0.2},
        {"temperature": 1.5, "seed": 3, "top_p": 0.5},
        {"max_tokens": 60, "min_tokens": 50, "ignore_eos": True},
    ],
)
def test_an_option_does_what_it_does_without_http(
    post: Post, generate: Generate, options: dict[str, Any]
) -> None:
    [choice] = choices_of(post(**options))
    assert choice["text"] == generate(**options)[0].text


def test_a_bias_is_keyed_by_token_ids_as_strings(post: Post, engine: AdaptiveEngine) -> None:
    [choice] = choices_of(post(logit_bias={"65": 100}, max_tokens=4))
    assert choice["text"] == engine.tokenizer.decode([65] * 4)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text(post: Post, generate: Generate, stream: bool) -> None:
    text = generate(max_tokens=30)[0].text
    stop = text[9:12]
    for given in (stop, [stop], ["§", stop, "no", "nor"]):
        response = post(stop=given, max_tokens=30, stream=stream)
        choices = (
            [chunk["choices"][0] for chunk in chunks_of(response)]
            if stream
            else choices_of(response)
        )
        assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"


def test_neutral_values_of_stop_change_nothing(post: Post, generate: Generate) -> None:
    expected = generate()[0].text
    neutral: tuple[Any, ...] = ("", [], None)
    for stop in neutral:
        assert choices_of(post(stop=stop))[0]["text"] == expected


def test_stop_tokens_end_the_request(post: Post, generate: Generate) -> None:
    tokens = generate()[0].token_ids
    response = post(stop_token_ids=[tokens[4]])
    assert choices_of(response)[0]["finish_reason"] == "stop"
    assert response.json()["usage"]["completion_tokens"] == tokens.index(tokens[4]) + 1


def test_several_choices_are_counted_together(post: Post, generate: Generate) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "seed": 5, "n": 3, "ignore_eos": True}
    response = post(best_of=3, offramp={"stats": True}, **options)
    choices = choices_of(response)
    expected = generate(**options)
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["text"] for choice in choices] == [each.text for each in expected]
    assert [choice["offramp"]["exit_layers"] for choice in choices] == [
        each.exit_layers for each in expected
    ]
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == expected[0].stats.prompt_tokens
    assert usage["completion_tokens"] == 36
    assert usage["total_tokens"] == usage["prompt_tokens"] + 36
    assert "offramp" not in response.json()


def test_streams_of_several_choices_are_interleaved(post: Post, generate: Generate) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "seed": 5, "n": 2, "ignore_eos": True}
    response = post(stream=True, stream_options={"include_usage": True}, **options)
    *chunks, usage = chunks_of(response)
    places = [chunk["choices"][0]["index"] for chunk in chunks]
    assert sorted(places) == [0] * 12 + [1] * 12
    assert 1 in places[:12]
    for index, expected in enumerate(generate(**options)):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == expected.text
        assert [choice["finish_reason"] for choice in own] == [None] * 11 + ["length"]
    assert usage["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_comes_before_every_choice(post: Post, generate: Generate, stream: bool) -> None:
    text = PROMPT + generate()[0].text
    response = post(echo=True, n=2, stream=stream)
    if not stream:
        assert [choice["text"] for choice in choices_of(response)] == [text] * 2
        return
    texts = ["", ""]
    for chunk in chunks_of(response):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [text] * 2


def test_logprobs_have_the_shape_of_openais(
    post: Post, generate: Generate, engine: AdaptiveEngine
) -> None:
    [expected] = generate(logprobs=2)
    [choice] = choices_of(post(logprobs=2))
    block = choice["logprobs"]
    assert set(block) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(block["tokens"]) == choice["text"]
    assert block["token_logprobs"] == pytest.approx(expected.logprobs)
    assert expected.top_logprobs is not None
    for named, top in zip(block["top_logprobs"], expected.top_logprobs, strict=True):
        assert named == pytest.approx(
            {engine.tokenizer.decode([token]): value for token, value in top}
        )
    for offset, token in zip(block["text_offset"], block["tokens"], strict=True):
        assert choice["text"][offset : offset + len(token)] == token
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(post(logprobs=2, stream=1))]
    for key in block:
        assert [value for each in streamed for value in each[key]] == block[key]


def test_the_drawn_token_is_always_among_the_top(post: Post) -> None:
    for count in (0, 1):
        [choice] = choices_of(post(logprobs=count, temperature=3.0, seed=1))
        block = choice["logprobs"]
        for token, logprob, top in zip(
            block["tokens"], block["token_logprobs"], block["top_logprobs"], strict=True
        ):
            assert top[token] == logprob
            assert len(top) <= count + 1


def test_half_characters_keep_their_names_apart(engine: AdaptiveEngine) -> None:
    tokenizer = engine.tokenizer
    name = token_namer(tokenizer)
    halves = [token for token in range(512) if "\ufffd" in tokenizer.decode([token])]
    assert len(halves) > 10
    assert len({name(token) for token in halves}) == len(halves)
    assert name(tokenizer.encode("import")[0]) == "import"


def test_an_impossible_token_has_a_logprob_that_json_can_hold() -> None:
    top = ((1, 0.0), (2, float("-inf")))
    event = TokenEvent("r", 2, "b", 3, 0, None, float("-inf"), top, 5)
    block = legacy_logprobs([event], str)
    assert block == {
        "tokens": ["2"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"1": 0.0, "2": -9999.0}],
        "text_offset": [5],
    }


BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", True),
    ("n", 1.5),
    ("n", 4),  # two slots, one may wait
    ("n", 129),
    ("best_of", 0),
    ("logprobs", -1),
    ("logprobs", 6),
    ("logprobs", True),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", [""]),
    ("stop", 3),
    ("stop", [3]),
    ("presence_penalty", 2.5),
    ("presence_penalty", "much"),
    ("frequency_penalty", -2.5),
    ("frequency_penalty", True),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("repetition_penalty", 1e300),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("top_k", -2),
    ("top_k", 0.5),
    ("min_tokens", -1),
    ("min_tokens", 13),
    ("stop_token_ids", 3),
    ("stop_token_ids", [4096]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"4096": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": "much"}),
    ("temperature", True),
    ("temperature", 10**400),
    ("seed", True),
    ("ignore_eos", "perhaps"),
    ("echo", 7),
]


@pytest.mark.parametrize(("field", "value"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_names_its_field(post: Post, field: str, value: Any, stream: bool) -> None:
    response = post(**{field: value, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field
    assert error["message"].startswith(field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["presence_penalty", "repetition_penalty", "min_p", "n"])
def test_numbers_that_are_none_are_refused(post: Post, field: str, number: str) -> None:
    response = post(json.dumps({**BODY, field: "?"}).replace('"?"', number))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_choices_are_taken_all_or_none(
    post: Post, service: EngineService, engine: AdaptiveEngine
) -> None:
    async def scenario() -> None:
        _, running = await service.submit("import os", SamplingParams(max_tokens=1000))
        await anext(running)
        _, other = await service.submit_all(["import os"], SamplingParams(max_tokens=1000, n=2))
        with pytest.raises(OverloadedError):
            await service.submit_all(["import os"], SamplingParams(n=2))
        await running.aclose()  # type: ignore[attr-defined]  # async generators have aclose
        await anext(other)
        await other.aclose()  # type: ignore[attr-defined]  # as above
        with pytest.raises(RequestError):  # obeyed once the commands before it were
            await service.submit([], SamplingParams())
        assert engine.load == (0, 0)

    asyncio.run(scenario())
    assert choices_of(post())


def test_choices_share_a_policy(
    post: Post, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(1, 100))
    policy = engine.current_policy().policy
    monkeypatch.setattr(
        engine, "current_policy", lambda: PolicySnapshot(next(numbers), "a", policy)
    )
    choices = choices_of(post(n=3, offramp={"stats": True}))
    assert [choice["offramp"]["generation"] for choice in choices] == [1, 1, 1]


def test_openais_client_reads_all_of_it(app: FastAPI, generate: Generate) -> None:
    async def use() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            client = openai.AsyncOpenAI(
                base_url="http://offramp/v1",
                api_key="any-key",
                http_client=http,  # type: ignore[arg-type]  # httpx's serves, typed as httpx2's
                max_retries=0,
            )
            answer = await client.completions.create(
                model="reference",
                prompt=PROMPT,
                max_tokens=12,
                temperature=1.0,
                seed=5,
                n=2,
                logprobs=3,
                stop=["§"],
                presence_penalty=0.5,
                frequency_penalty=0.5,
                logit_bias={"65": -100},
                extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
            )
        expected = generate(
            temperature=1.0,
            seed=5,
            n=2,
            logprobs=3,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={65: -100},
            top_k=50,
            min_p=0.01,
            repetition_penalty=1.1,
        )
        assert [choice.text for choice in answer.choices] == [each.text for each in expected]
        for choice, each in zip(answer.choices, expected, strict=True):
            assert choice.logprobs is not None
            assert choice.logprobs.token_logprobs == pytest.approx(each.logprobs)

    asyncio.run(asyncio.wait_for(use(), 60))
