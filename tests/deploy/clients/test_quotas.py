"""What each key may ask per minute, and at least which quality it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.release.certified_points import Target
from offramp.deploy.clients.allowances import UNBOUND, Allowance
from offramp.deploy.clients.client_keys import ClientKeys, add_client, bound_client
from offramp.deploy.clients.quotas import QuotaError, Quotas
from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.limits import wish_within
from offramp.worker.decoding.request import KVWish
from offramp.worker.engine.service import EngineService

BODY = {"model": "reference", "prompt": [11, 12], "max_tokens": 3, "temperature": 0}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_030.0  # half of a minute of the clock has passed

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", clock)
    return clock


def refused(quotas: Quotas, cost: int) -> QuotaError:
    with pytest.raises(QuotaError) as error:
        quotas.take("alice", "tokens", cost)
    return error.value


def test_who_comes_back_when_told_is_let_in_and_not_before(clock: Clock) -> None:
    quotas = Quotas(lambda _: Allowance(tokens_per_minute=100))
    quotas.take("alice", "tokens", 60)
    for cost in (50, 90, 100):
        early = refused(quotas, cost)
        clock.now_s += early.retry_after_s - 2
        refused(quotas, cost)
        clock.now_s += 2
        quotas.take("alice", "tokens", cost)


def test_what_counts_is_told_until_it_is_forgotten(clock: Clock) -> None:
    quotas = Quotas(lambda _: Allowance(tokens_per_minute=100))
    quotas.take("alice", "tokens", 60)
    told = quotas.headers("alice")
    assert told == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "1m30s",
    }
    clock.now_s += 60  # a minute later, half of them count
    assert quotas.headers("alice")["x-ratelimit-remaining-tokens"] == "70"
    clock.now_s += 30
    assert quotas.headers("alice")["x-ratelimit-reset-tokens"] == "0s"
    assert quotas.headers("alice")["x-ratelimit-remaining-tokens"] == "100"


def test_each_client_has_its_own_and_nobody_else_any() -> None:
    quotas = Quotas(lambda name: Allowance(tokens_per_minute=100) if name == "alice" else UNBOUND)
    quotas.take("alice", "tokens", 100)
    refused(quotas, 1)
    for other in ("bob", None):
        quotas.take(other, "tokens", 10**9)
        assert quotas.headers(other) == {}
    quotas.take("alice", "requests")
    never = refused(quotas, 101)
    assert "this request may take 101. Shorten the prompt or lower max_tokens." in str(never)


@pytest.mark.parametrize(
    ("least", "asked", "wish"),
    [
        (None, "project", "project"),
        (0.9, None, 0.9),
        (0.9, 0.95, 0.95),
        (0.9, "verify", "verify"),
        ("lossless", None, "verify"),
        ("lossless", 1.0, 1.0),
        (0.9, Target(latency_budget_ms=5), Target(latency_budget_ms=5, quality=0.9)),
        ("lossless", Target(energy_weight=1), Target(energy_weight=1, quality=1.0)),
        (0.9, Target(quality=0.95), Target(quality=0.95)),
    ],
)
def test_a_request_gets_the_quality_of_its_key(
    least: Any, asked: KVWish | None, wish: KVWish
) -> None:
    assert wish_within(Allowance(quality=least), asked) == wish


@pytest.mark.parametrize(
    ("least", "asked", "field"),
    [
        (0.9, 0.8, "offramp.quality"),
        (0.9, "defer", "offramp.kv_mode"),
        ("lossless", 0.999, "offramp.quality"),
        (0.9, Target(latency_budget_ms=5, quality=0.8), "offramp.quality"),
    ],
)
def test_less_than_its_keys_quality_is_refused(least: Any, asked: KVWish, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        wish_within(Allowance(quality=least), asked)


@pytest.mark.parametrize(
    "bounds",
    [{"requests_per_minute": 0}, {"tokens_per_minute": True}, {"quality": 1.1}, {"quality": "all"}],
)
def test_a_bound_that_nothing_is_within_is_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bounds))):
        Allowance(**bounds)


@pytest.fixture
def keyed(stand_in: Any, service: EngineService, tmp_path: Path) -> tuple[FastAPI, Path, str]:
    """An app, the file of its clients, and the key of one."""
    backend, path = stand_in(service), tmp_path / "clients.json"
    key = add_client(path, "alice", Allowance(requests_per_minute=2, quality="lossless"))
    backend.clients = ClientKeys(path)
    return create_app(backend), path, key


Post = Callable[..., Any]


def test_a_spent_key_is_told_so_in_openais_words(
    keyed: tuple[FastAPI, Path, str], ask: Post
) -> None:
    app, path, key = keyed
    headers = {"authorization": f"Bearer {key}"}

    async def call(client: httpx.AsyncClient) -> None:
        async def post(**fields: Any) -> httpx.Response:
            return await client.post("/v1/completions", json=BODY | fields, headers=headers)

        first = await post(offramp={"stats": True})
        assert first.status_code == 200
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert "x-ratelimit-limit-tokens" not in first.headers
        stats = first.json()["offramp"]
        lossy = await post(offramp={"kv_mode": "project"})
        assert (lossy.status_code, lossy.json()["error"]["param"]) == (400, "offramp.kv_mode")
        assert stats["drafts"] > 0, "the key's quality had full depth verify"
        spent = await post()
        assert spent.status_code == 429
        error = spent.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert 1 <= int(spent.headers["retry-after"]) <= 120
        assert spent.headers["x-ratelimit-remaining-requests"] == "0"
        # Bounds may change while the server runs.
        bound_client(path, "alice", Allowance(tokens_per_minute=12))
        assert (await post()).headers["x-ratelimit-remaining-tokens"] == "7"
        assert (await post()).headers["x-ratelimit-remaining-tokens"] == "2"
        chat = {"model": "reference", "messages": [{"role": "user", "content": "x"}]}
        long = await post(max_tokens=100)
        assert (long.status_code, long.json()["error"]["type"]) == (429, "tokens")
        assert (await client.post("/tokenize", json=chat, headers=headers)).status_code != 429

    ask(app, call)
