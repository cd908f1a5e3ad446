"""/v1/classify over a real classifier, without Ray: shapes, limits, errors, quality and counts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from offramp.controller.policies.protocols import FixedExit
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.observability.tracing import SPAN, Spans
from offramp.deploy.http.observability.worker_metrics import REPORTED
from offramp.deploy.http.shapes.score_shapes import scored_label
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.text_service import TextService
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.encoding import PromptEncoder
from support.classifying.sequence_models import LABELS, ByLength, encoder_stack, like_heads
from support.cost_tables import OneJoule
from support.releases.certificates import certificate
from support.tokenizers import word_tokenizer

POLICY = PolicySnapshot(
    7,
    "d" * 64,
    ByLength({1: 2, 3: 4}),
    certificate(decode_mode="classify", translators="", delta=0.05),
)


class Classes:
    """What the route needs of a worker, without Ray or Redis."""

    model_id = "colours"
    started_at = 1_800_000_000
    labels: tuple[str, ...] = LABELS

    def __init__(self, service: TextService) -> None:
        self.service = service
        self.clients = ClientKeys()
        self.layers: int = service.classifier.stack.layers
        self.most_tokens: int = service.classifier.stack.context
        self.tokenizer = word_tokenizer(97)
        self.encoder = PromptEncoder(self.tokenizer, self.most_tokens)

    async def classify(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None,
        request_id: str,
        best: int | None = None,
    ) -> list[ClassifiedText]:
        return await self.service.classify(
            sequences, quality=quality, split_by=request_id, best=best
        )

    def trouble(self) -> str | None:
        return None if self.service.is_healthy else "stuck"

    def load(self) -> tuple[int, int]:
        return sum(self.service.load), 12

    def reports(self) -> list[dict[str, Any]]:
        said = {"worker": "w", "generation": 7, "digest": "", "guarantee": "", "state": "ACK"} | {
            "tasks": 0
        }
        return [{field: 0 for field, _ in REPORTED.values()} | said]


READ = {"method": "attributed", "source": "a counter", "read_share": 1.0}


@pytest.fixture(scope="module")
def backend() -> Iterator[Classes]:
    bounds = [torch.tensor([[1.0, 1.5]] * 3)] * 4
    service = TextService(
        Classifier(encoder_stack(), like_heads(bounds)), lambda: POLICY, rows=2, source=OneJoule()
    )
    service.start()
    yield Classes(service)
    service.stop()


@pytest.fixture
def app(backend: Classes) -> FastAPI:
    return create_app(backend, replace(HttpLimits(), choices=4))


def body(given: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "colours", "input": given, **fields}


def test_one_text_or_many_are_answered_as_vllm_does(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        stats = {"stats": True}
        texts = ["w5 w6", "w5 w6 w7 w8", "w5 w6 w7 w8 w9"]
        many = await client.post("/v1/classify", json=body(texts, offramp=stats))
        alone = await client.post("/v1/classify", json=body(texts[0]))
        return many.json(), alone.json(), (await client.get("/metrics")).text

    many, alone, metrics = ask(app, scenario)
    assert many["object"] == "list"
    assert many["model"] == "colours"
    assert many["usage"] == {"prompt_tokens": 11, "total_tokens": 11, "completion_tokens": 0}
    assert [each["index"] for each in many["data"]] == [0, 1, 2]
    for each in many["data"]:
        assert each["num_classes"] == len(each["probs"]) == 3
        assert each["label"] == LABELS[each["probs"].index(max(each["probs"]))]
        assert sum(each["probs"]) == pytest.approx(1)
    assert [each["offramp"]["exit_layer"] for each in many["data"]] == [1, 3, 5]
    # The first batch is of two, which ran 1 and 3 layers for a joule.
    told = {"exit_layer": 1, "layers": 5, "generation": 7, "energy": {"joules": 0.25, **READ}}
    assert many["data"][0]["offramp"] == told
    assert "offramp" not in alone["data"][0]
    assert alone["data"][0]["label"] == many["data"][0]["label"]
    assert 'offramp_layers_executed_total{model_name="colours"} 10.0' in metrics
    assert 'offramp_prompt_tokens_total{model_name="colours"} 13.0' in metrics


@pytest.mark.parametrize(
    ("quality", "layers"), [(None, 1), (0.95, 1), (0.96, 5), ("lossless", 5), (1, 5)]
)
def test_a_quality_that_is_not_certified_runs_every_layer(
    app: FastAPI, ask: Any, quality: Any, layers: int
) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        asked = {"stats": True, "quality": quality}
        return (await client.post("/v1/classify", json=body("w5 w6", offramp=asked))).json()

    assert ask(app, scenario)["data"][0]["offramp"]["exit_layer"] == layers


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        (body([]), 400, "input"),
        (body("  "), 400, "input"),
        (body("w6 " * 65), 400, "input"),
        (body("w5", offramp={"stats": "often"}), 400, "offramp.stats"),
        (body(["w5", ""]), 400, "input[1]"),
        (body(["w5", "w6 " * 65]), 400, "input[1]"),
        (body(["w5"] * 5), 400, "input"),
        (body([5, 6]), 400, "input"),
        ({"model": "colours"}, 400, "input"),
        (body("w5", offramp={"quality": 2}), 400, "offramp.quality"),
        (body("w5", offramp={"kv_mode": "defer"}), 400, "offramp.kv_mode"),
        (body("w5") | {"model": "other"}, 404, None),
    ],
)
def test_what_cannot_be_classified_is_refused_by_name(
    app: FastAPI, ask: Any, sent: Any, status: int, param: str | None
) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/classify", json=sent)

    reply = ask(app, scenario)
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == param


def test_what_is_wrong_is_said_of_the_type_that_was_sent(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[str]:
        replies = [
            await client.post("/v1/classify", json=body(each)) for each in ([], [5, 6], "w6 " * 65)
        ]
        return [reply.json()["error"]["message"] for reply in replies]

    none, numbers, long = ask(app, scenario)
    assert none.startswith("input: List should have at least 1 item")
    assert numbers == "input: Input should be a valid string."
    assert long == "input: has 65 tokens, and the model's context is 64. Shorten it."


def test_a_body_that_is_sent_as_no_json_is_told_so(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        content = json.dumps(body("w5"))
        headers = {"content-type": "application/x-www-form-urlencoded"}  # as curl -d sends it
        return await client.post("/v1/classify", content=content, headers=headers)

    reply = ask(app, scenario)
    assert reply.status_code == 400
    assert "Send content-type: application/json" in reply.json()["error"]["message"]


def test_a_request_is_a_span_that_tells_how_deep_its_texts_went(backend: Classes, ask: Any) -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    app = create_app(backend, spans=Spans(provider.get_tracer("offramp")))

    async def scenario(client: httpx.AsyncClient) -> None:
        texts = ["w5 w6", "w5 w6 w7 w8", "w5 w6 w7 w8 w9"]
        await client.post("/v1/classify", json=body(texts), headers={"x-request-id": "mine"})
        await client.post("/v1/score", json=pairs("w5", ["w6", "w6 " * 65], label="red"))

    ask(app, scenario)
    good, bad = kept.get_finished_spans()
    assert dict(good.attributes or {}) == {
        "gen_ai.request.model": "colours",
        "gen_ai.request.id": "mine",
        "http.route": "/v1/classify",
        "gen_ai.usage.input_tokens": 11,
        "offramp.texts": 3,
        "offramp.generation": 7,
        "offramp.mean_exit_layer": 3.0,
        "offramp.layer_calls": 9,
        "offramp.energy_joules": 2.0,
        "offramp.energy_method": "attributed",
        "offramp.energy_source": "a counter",
    }
    assert (good.name, good.status.is_ok) == (SPAN, True)
    assert not bad.status.is_ok
    assert "text_2[1]" in (bad.status.description or "")


def test_openapi_tells_of_the_route_and_of_no_other_task(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        missing = await client.post("/v1/completions", json={"model": "colours", "prompt": "w5"})
        return missing, (await client.get("/openapi.json")).json()["paths"]

    missing, paths = ask(app, scenario)
    assert "/v1/classify" in paths
    assert "/v1/completions" not in paths
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"


def test_another_exit_is_served_as_soon_as_it_is_current(backend: Classes, ask: Any) -> None:
    other = replace(POLICY, generation=8, policy=FixedExit(2))
    service = TextService(backend.service.classifier, lambda: current[0])
    current = [POLICY]
    service.start()

    async def scenario(client: httpx.AsyncClient) -> Any:
        found = []
        for snapshot in (POLICY, other):
            current[0] = snapshot
            reply = await client.post("/v1/classify", json=body("w5 w6", offramp={"stats": True}))
            found.append(reply.json()["data"][0]["offramp"]["generation"])
        return found

    assert ask(create_app(Classes(service)), scenario) == [7, 8]
    service.stop()


def pairs(first: Any, second: Any, **options: Any) -> dict[str, Any]:
    return {"model": "colours", "text_1": first, "text_2": second, "offramp": options}


ANSWERS = ["w9 w30 w31", "w40 w41 w8", "w50 w51 w52 w53"]


def test_pairs_are_scored_as_vllm_does(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        async def post(path: str, sent: Any) -> Any:
            reply = await client.post(path, json=sent)
            assert reply.status_code == 200, reply.text
            return reply.json()

        wish = {"label": "green", "quality": "lossless"}
        one_to_many = await post("/v1/score", pairs("w5", ANSWERS, **wish))
        each = await post("/v1/score", pairs(["w5"] * 3, ANSWERS, stats=True, **wish))
        alone = await post("/v1/score", pairs("", "w5 w6", label="green"))
        return one_to_many, each, alone, await post("/v1/classify", body("w5 w6"))

    one_to_many, each, alone, classified = ask(app, scenario)
    assert one_to_many["object"] == "list"
    assert one_to_many["id"].startswith("score-")
    assert one_to_many["usage"] == {"prompt_tokens": 13, "total_tokens": 13, "completion_tokens": 0}
    assert [set(said) for said in one_to_many["data"]] == [{"index", "object", "score"}] * 3
    scores = [said["score"] for said in one_to_many["data"]]
    assert [said["score"] for said in each["data"]] == pytest.approx(scores, abs=1e-5)
    stats = {"exit_layer": 5, "layers": 5, "generation": 0, "energy": {"joules": 0.5, **READ}}
    assert each["data"][0]["offramp"] == stats
    # Without a first text the second is read as /v1/classify reads it.
    assert alone["data"][0]["score"] == classified["data"][0]["probs"][LABELS.index("green")]


def test_the_best_is_found_without_running_all_to_the_end(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        asked = {"label": "red", "stats": True}
        exact = await client.post("/v1/score", json=pairs("w5", ANSWERS, quality=1, **asked))
        raced = await client.post("/v1/score", json=pairs("w5", ANSWERS, best=True, **asked))
        return exact.json()["data"], raced.json()["data"]

    exact, raced = ask(app, scenario)
    best = max(range(3), key=lambda place: exact[place]["score"])
    # Three run together, though a batch has two rows.
    assert [said["offramp"]["best"] for said in raced] == [place == best for place in range(3)]
    assert raced[best]["score"] == pytest.approx(exact[best]["score"], abs=1e-5)
    assert raced[best]["offramp"]["exit_layer"] == 5
    assert min(said["offramp"]["exit_layer"] for said in raced) < 5


class Redeployed(Classes):
    """A pool whose workers give way to some with other classes while a request is under way."""

    async def classify(self, *args: Any, **asked: Any) -> list[ClassifiedText]:
        self.labels = ("blue?", *LABELS)
        found = await super().classify(*args, **asked)
        return [replace(each, probs=(0.0, *each.probs)) for each in found]


def test_a_class_is_scored_by_its_name_whoever_answers(backend: Classes, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        reply = await client.post("/v1/score", json=pairs("", "w5 w6", label="green"))
        return reply.json()["data"][0]["score"]

    apps = create_app(backend), create_app(Redeployed(backend.service))
    before, after = (ask(app, scenario) for app in apps)
    assert before == pytest.approx(after) != 0


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        (pairs("w5", ANSWERS), "offramp.label"),
        (pairs("w5", ANSWERS, label="mauve"), "offramp.label"),
        (pairs(["w5", "w6"], ANSWERS, label="red"), "text_2"),
        (pairs("w5", ["w6", " "], label="red"), "text_2[1]"),
        (pairs("w5", " ", label="red"), "text_2"),
        (pairs("\ud800", ANSWERS, label="red"), "text_1"),
        (pairs(["w5", "\ud800", "w6"], ANSWERS, label="red"), "text_1[1]"),
        (pairs("w5 " * 65, ANSWERS, label="red"), "text_1"),
        (pairs("w5 " * 60, ["w6 " * 9], label="red"), "text_2[0]"),
        (pairs("w5", "w6 " * 65, label="red"), "text_2"),
        (pairs("w5", ANSWERS, label=1), "offramp.label"),
        (pairs("w5", ["w6 " * 65], label="red"), "text_2[0]"),
        (pairs("w5", ["w6"] * 5, label="red"), "text_2"),
        (pairs("w5", [], label="red"), "text_2"),
        (pairs("w5", ANSWERS, label="red", best=True, quality=0.9), "offramp.best"),
        ({"model": "colours", "text_2": "w5"}, "text_1"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(
    app: FastAPI, ask: Any, sent: Any, param: str
) -> None:
    async def scenario(client: httpx.AsyncClient) -> httpx.Response:
        content = json.dumps(sent)  # httpx would send no half of a surrogate pair
        headers = {"content-type": "application/json"}
        return await client.post("/v1/score", content=content, headers=headers)

    reply = ask(app, scenario)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("asked", [None, "b"])
def test_of_two_classes_the_second_is_scored_unless_another_is_named(asked: str | None) -> None:
    assert scored_label(asked, ("a", "b")) == 1
    assert scored_label("a", ("a", "b")) == 0
