"""Several models behind one address: each request reaches the one that it names."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.controller.errors import ConfigError
from offramp.deploy.http.backend import EngineBackend
from offramp.deploy.http.http_app import create_app
from offramp.worker.engine.service import EngineService


class Named(EngineBackend):
    """A model that may be in trouble, or full."""

    def __init__(self, name: str, service: EngineService) -> None:
        super().__init__(name, service)
        self.is_lost = self.is_full = False

    def trouble(self) -> str | None:
        return "without workers" if self.is_lost else super().trouble()

    def load(self) -> tuple[int, int]:
        return (3, 3) if self.is_full else super().load()


@pytest.fixture
def pools(service: EngineService) -> tuple[Named, Named]:
    return Named("reference", service), Named("org/other", service)


@pytest.fixture
def app(pools: tuple[Named, Named]) -> FastAPI:
    return create_app(pools)


def body(model: str | None, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": [11, 12], "max_tokens": 3, **fields}


def test_requests_and_their_counts_go_to_the_model_they_name(app: FastAPI, ask: Any) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        made = [
            (await client.post("/v1/completions", json=body(name))).json()
            for name in ("org/other", "reference", "org/other")
        ]
        return made, (await client.get("/metrics")).text

    made, metrics = ask(app, scenario)
    assert [each["model"] for each in made] == ["org/other", "reference", "org/other"]
    for name, tokens in (("reference", 3), ("org/other", 6)):
        assert f'offramp_generation_tokens_total{{model_name="{name}"}} {float(tokens)}' in metrics
        ended = f'{{finished_reason="length",model_name="{name}"}} {tokens / 3}'
        assert f"offramp_request_success_total{ended}" in metrics
        assert f'offramp_http_requests_total{{model_name="{name}",status="200"}}' in metrics
        assert f'exit_layer_count{{model_name="{name}"}} {float(tokens)}' in metrics
    # Each name is a family once, however many models there are.
    assert metrics.count("# TYPE offramp_exit_layer histogram") == 1


def test_models_are_listed_and_one_that_is_not_served_is_told_of_all(
    app: FastAPI, ask: Any
) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        listed = (await client.get("/v1/models")).json()["data"]
        one = (await client.get("/v1/models/org/other")).json()
        return listed, one, await client.post("/v1/completions", json=body("third"))

    listed, one, missing = ask(app, scenario)
    assert [each["id"] for each in listed] == ["reference", "org/other"]
    assert one in listed
    assert missing.status_code == 404
    assert "'reference' or 'org/other'" in missing.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/policy"])
def test_where_a_model_may_be_left_out_it_is_asked_for(app: FastAPI, ask: Any, path: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        found = []
        for model in (None, "org/other", "third"):
            if path == "/v1/policy":
                reply = await client.get(path, params={"model": model} if model else {})
            else:
                sent = {"prompt": "x"} if path == "/tokenize" else {"tokens": [11]}
                reply = await client.post(path, json=sent | {"model": model})
            found.append(reply)
        return found

    unnamed, named, unknown = ask(app, scenario)
    assert (unnamed.status_code, named.status_code, unknown.status_code) == (400, 200, 404)
    assert unnamed.json()["error"]["param"] == "model"


def test_a_model_that_is_lost_or_full_refuses_for_itself(
    app: FastAPI, pools: tuple[Named, Named], ask: Any
) -> None:
    async def scenario(client: httpx.AsyncClient) -> Any:
        async def both() -> list[httpx.Response]:
            names = ("reference", "org/other")
            return [await client.post("/v1/completions", json=body(name)) for name in names]

        pools[1].is_lost = True
        lost, states = await both(), [await client.get(each) for each in ("/health", "/ready")]
        pools[1].is_lost, pools[1].is_full = False, True
        full = await both()
        pools[0].is_lost = pools[1].is_lost = True
        return lost, states, full, await both(), await client.get("/health")

    lost, states, full, none, unhealthy = ask(app, scenario)
    assert [each.status_code for each in lost] == [200, 503]
    assert lost[1].json()["error"]["code"] == "without_workers"
    assert lost[1].headers["retry-after"]
    for state, fine in zip(states, ("ok", "ready"), strict=True):
        assert state.status_code == 200
        assert state.json()["models"] == {"reference": fine, "org/other": "without workers"}
    assert [each.status_code for each in full] == [200, 429]
    assert full[1].json()["error"]["code"] == "overloaded"
    assert [each.status_code for each in none] == [503, 503]
    assert unhealthy.status_code == 503


def test_two_of_one_name_are_refused(service: EngineService) -> None:
    with pytest.raises(ConfigError, match="names of their own, and are x, x"):
        create_app([Named("x", service), Named("x", service)])
