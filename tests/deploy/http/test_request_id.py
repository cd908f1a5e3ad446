"""Clients' own ids decide between a release and its canary, whichever worker answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.manifest import Rollout
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.request import PolicySnapshot

ROLLOUT = Rollout(percent=50, salt="s", stable_generation=7, stable_digest="d" * 64)
CANARY = PolicySnapshot(8, "e" * 64, FixedExit(3), rollout=ROLLOUT)
STABLE = PolicySnapshot(7, "d" * 64, FixedExit(6), canary=CANARY)
BODY = {"model": "reference", "prompt": [5, 6], "max_tokens": 2, "n": 2, "offramp": {"stats": True}}


@pytest.fixture
def generations(app: FastAPI, ask: Any, engine: AdaptiveEngine, monkeypatch: Any) -> Any:
    """The generation that each of some requests, with these headers, was answered by."""
    monkeypatch.setattr(engine, "current_policy", lambda: STABLE)

    def generations(headers: list[dict[str, str]]) -> list[int]:
        async def post(client: httpx.AsyncClient) -> list[int]:
            found: list[int] = []
            for each in headers:
                reply = await client.post("/v1/completions", json=BODY, headers=each)
                told = {choice["offramp"]["generation"] for choice in reply.json()["choices"]}
                assert len(told) == 1, "one request under two policies"
                found += told
            return found

        result: list[int] = ask(app, post)
        return result

    return generations


def test_a_clients_id_decides_and_stays(generations: Any) -> None:
    ids = [f"session-{number}" for number in range(12)]
    expected = [8 if ROLLOUT.picks(each) else 7 for each in ids]
    assert set(expected) == {7, 8}
    for name in ("X-Request-Id", "x-request-id"):
        assert generations([{name: each} for each in ids]) == expected


def test_without_one_the_replys_id_decides(generations: Any) -> None:
    assert set(generations([{}] * 24)) == {7, 8}  # one run in eight million has one alone
