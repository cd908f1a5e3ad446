"""The console on a real Redis: each state of a channel as its page shows it, and who may act."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState
from offramp.controller.watching.tally import Tally
from offramp.deploy.console.console_app import create_console, follow
from offramp.deploy.serve.publishing import open_publisher
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings

KEY = "the-key-of-the-console"
BEARER = {"Authorization": f"Bearer {KEY}"}
REASON = "generation 2: full depth disagrees with 31.0% or more of what is audited"


class Stage:
    """A channel with a console before it."""

    def __init__(self, server: EmbeddedRedis, folder: Path) -> None:
        self.server = server
        self.settings = Settings(redis_url=server.url, home=folder / "home")
        self.registry = RedisRegistry(server.url, "default", 1.0)
        self.app = create_console(self.registry, self.settings, KEY)
        self.client = TestClient(self.app, base_url="http://offramp")

    @property
    def publisher(self) -> Publisher:
        return open_publisher(self.settings, self.registry)

    def publish(self, layer: int, *, promote: bool = True) -> int:
        packed = pack_policy(FixedExit(layer), np.zeros((2, 3), np.float32))
        publisher = self.publisher
        release = publisher.release(
            packed, model="aa", tokenizer="bb", training={}, metrics={}, uncertified=True
        )
        if promote:
            publisher.promote(release.generation)
        return release.generation

    def say(self, state: AckState, generation: int, reason: str = "", *tallies: Tally) -> None:
        is_tripped = state is AckState.TRIPPED
        ack = Ack(
            worker="worker-0-ab",
            boot="b",
            generation=0 if is_tripped else generation,
            digest="" if is_tripped else "c" * 64,
            about=generation,
            state=state,
            reason=reason,
            at=time.time(),
            tallies=tallies,
        )
        self.registry.acknowledge(ack, 60.0)

    def stop_redis(self) -> None:
        redis.Redis.from_url(self.server.url).shutdown(nosave=True)

    def page(self) -> str:
        reply = self.client.get("/", headers=BEARER)
        assert reply.status_code == 200, reply.text
        return " ".join(reply.text.split())


def tally(generation: int, disagreed: int, **changed: Any) -> Tally:
    counts: dict[str, Any] = {
        "tokens": 4000, "seconds": 80.0, "layers": 30_000, "requests": 100, "early": 2000,
        "paces": 2.0, "paces_squared": 0.0404, "depths": 750.0, "depths_squared": 5700.0,
        "audited": 400, "disagreed": disagreed, "exits": {"12": 2000, "3": 1500, "6:int4": 500},
        "meter": "modelled: 3 W", "batches": 60, "joules": 3.0, "joules_squared": 0.16,
        "points": 5, "point": 2, "moves": 3,
    }  # fmt: skip
    return Tally(generation=generation, **counts | changed)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        stage = Stage(server, tmp_path)
        yield stage
        stage.registry.close()


def no_release(stage: Stage) -> None:
    """Nothing was published."""


def stable_only(stage: Stage) -> None:
    stage.publish(3)
    stage.say(AckState.ACK, 1, "", tally(1, 4))


def canary(stage: Stage, disagreed: int = 4) -> None:
    stage.publish(3)
    stage.publish(5, promote=False)
    stage.publisher.roll_out(5)
    full: dict[str, Any] = {"joules": 6.0, "exits": {"12": 4000}}
    full |= {
        "early": 0,
        "audited": 0,
        "layers": 48_000,
        "depths": 1200.0,
        "depths_squared": 14400.0,
    }
    stage.say(AckState.ACK, 3, "", tally(1, 0, **full), tally(3, disagreed))


def failed_canary(stage: Stage) -> None:
    canary(stage, disagreed=200)


def tripped(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    stage.say(AckState.TRIPPED, 2, REASON)


def rolled_back(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    stage.publisher.rollback()
    stage.say(AckState.ACK, 3)


def redis_gone(stage: Stage) -> None:
    stage.publish(3)
    stage.stop_redis()


STATES: list[tuple[Callable[[Stage], None], list[str], list[str]]] = [
    (no_release, ["no release", "head: none", "No worker reports.", "offramp publish"], ["Roll b"]),
    (stable_only, ["serving", "worker-0-ab", "head: generation 1", "50.0%", "not reported",
      "<td>2 of 5</td>", "6:int4</th><td>12.5%</td>", "3</th><td>37.5%</td>"],
     ["Canary</h2>", "Trips"]),
    (canary, ["canary", "serves 5% of the requests", "0.1% to 4.2%", "Take it to 25%",
              "seconds per token", "38% against generation 1",
              "50% per token against generation 1 (modelled: 3 W)"], ["Trips", "99% of first"]),
    (failed_canary, ["fails</strong>: full depth disagrees with 4"], ["passes"]),
    (tripped, ["tripped", f"took generation 2 out of service: {REASON}"], ["Canary</h2>"]),
    (rolled_back, ["rolled back", "in place of 2", "generation 3"], ["Trips"]),
    (redis_gone, ["registry unreachable", "Unknown while the registry is away", "uncertified"],
     ["Live"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "said", "unsaid"), STATES, ids=lambda each: getattr(each, "__name__", "")
)
def test_each_state_is_shown(
    stage: Stage, tmp_path: Path, prepare: Callable[[Stage], None], said: list[str],
    unsaid: list[str],
) -> None:  # fmt: skip
    prepare(stage)
    page = stage.page()
    assert [each for each in said if each not in page] == []
    assert [each for each in unsaid if each in page] == []
    assert KEY not in page
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: the page was read, and not looked at")
    folder = Path(os.environ.get("CONSOLE_SCREENSHOTS", tmp_path))
    shot = folder / f"{prepare.__name__}.png"
    with listening(stage.app) as url:
        look(chromium, url, shot)
    assert shot.read_bytes()[:4] == b"\x89PNG"


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve the console on a port, to a browser that cannot send its key: that is added here."""

    async def known(scope: Any, receive: Any, send: Any) -> None:
        key = (b"authorization", BEARER["Authorization"].encode())
        await app({**scope, "headers": [*scope.get("headers", []), key]}, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(known, log_level="warning", lifespan="off")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(30)


def look(chromium: str, url: str, shot: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--timeout=3000"]
    size = "--window-size=1280,1250"
    profile = f"--user-data-dir={shot.parent / 'profile'}"
    subprocess.run(
        [chromium, *options, size, profile, f"--screenshot={shot}", url],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def test_nobody_without_the_key_sees_or_does_anything(stage: Stage) -> None:
    stage.publish(3)
    client = stage.client
    assert client.get("/", follow_redirects=False).headers["location"] == "/login"
    for path in ("/panel", "/api/status", "/api/history", "/api/diff?old=1&new=1", "/api/events"):
        assert client.get(path).status_code == 401, path
    for path in ("/api/promote", "/api/rollback"):
        assert client.post(path, json={}).status_code == 401
        assert client.get(path, headers=BEARER).status_code == 405
    wrong = {"Authorization": "Bearer another-key-than-that"}
    assert client.get("/api/status", headers=wrong).status_code == 401
    assert client.get("/health").json() == {"status": "ok"}


def test_a_session_acts_from_its_own_page_alone(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5)
    client, own = stage.client, {"Origin": "http://offramp"}
    assert client.post("/session", json={"key": "no"}, headers=own).status_code == 401
    assert client.post("/session", json={"key": KEY}).status_code == 401
    opened = client.post("/session", json={"key": KEY}, headers=own)
    assert opened.status_code == 204
    cookie = opened.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert KEY not in cookie
    assert client.get("/").status_code == 200
    for foreign in ({}, {"Origin": "http://offramp:81"}, {"Origin": "null"}):
        assert client.post("/api/rollback", json={}, headers=foreign).status_code == 401
    assert stage.publisher.promoted == 2
    assert client.post("/api/rollback", json={"expected": 2}, headers=own).json() == {"promoted": 3}
    assert client.delete("/session", headers=own).status_code == 204
    assert client.get("/api/status").status_code == 401


def test_the_api_does_what_the_commands_do(stage: Stage) -> None:
    stage.publish(3)
    stage.publish(5, promote=False)
    client = stage.client
    client.headers.update(BEARER)
    shown = client.get("/confirm/promote", params={"generation": 2, "percent": 5}).text
    assert "How generation 2 differs from 1" in shown
    wish = {"generation": 2, "percent": 5, "expected": 1}
    assert client.post("/api/promote", json=wish).json() == {"promoted": 3}
    late = client.post("/api/promote", json=wish)
    assert late.status_code == 409
    assert "the head moved" in late.json()["error"]
    assert client.post("/api/promote", json={"percent": 100}).json() == {"promoted": 4}
    assert client.post("/api/promote", json={}).status_code == 400
    assert client.post("/api/promote", json={"generations": 2}).status_code == 422
    assert client.post("/api/rollback", json={"expected": 4}).json() == {"promoted": 5}
    status = client.get("/api/status").json()
    assert (status["state"], status["promoted"]) == ("rolled back", 5)
    assert [each["generation"] for each in client.get("/api/history").json()] == list("54321")
    assert client.get("/api/diff", params={"old": 1, "new": 2}).json()
    (stage.settings.home / "publisher.pem").rename(stage.settings.home / "away.pem")
    refused = client.post("/api/rollback", json={})
    assert refused.status_code == 400
    assert "is not here" in refused.json()["error"]
    assert "this page only shows" in stage.page()


def test_events_are_streamed_as_they_come(stage: Stage) -> None:
    stage.publish(3)

    async def read() -> list[str]:
        stream = follow(stage.registry, 0)
        found = [await anext(stream), await anext(stream)]
        await asyncio.to_thread(stage.publish, 5)
        found += [await anext(stream), await anext(stream)]
        stage.stop_redis()
        found.append(await anext(stream))
        await stream.aclose()  # type: ignore[attr-defined]  # it is a generator
        return found

    found = asyncio.run(read())
    assert found[0] == found[2] == ": there\n\n"
    assert found[1].startswith('id: 1\nevent: promotion\ndata: {"generation": 1, ')
    assert found[3].startswith("id: 2\nevent: promotion\n")
    assert found[4].startswith("event: trouble\n")
    assert stage.client.get("/health").status_code == httpx.codes.OK
