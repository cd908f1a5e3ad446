"""A channel with a console before it, and a browser that looks at its pages."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import redis
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, ThresholdPolicy
from offramp.controller.release.certificate import Walked
from offramp.controller.release.manifest import MODEL_LAYERS
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState
from offramp.controller.watching.tally import Tally
from offramp.deploy.console.console_app import create_console
from offramp.deploy.serve.publishing import open_publisher
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings
from support.releases.certificates import certificate

KEY = "the-key-of-the-console"
BEARER = {"Authorization": f"Bearer {KEY}"}


class Photograph(Protocol):
    """Takes a picture of a page, under a name."""

    def __call__(
        self, name: str, path: str, *, is_known: bool = ..., is_dark: bool = ...
    ) -> None: ...


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

    def publish_certified(self, risks: dict[float, float], early: float) -> int:
        """A threshold policy that was calibrated: loss found by setting, safest first.

        Args:
            risks: All within the promise.
            early: Share of the tokens that leave at the first setting; each next one doubles it.
        """
        setting = [*risks][-1]
        policy = ThresholdPolicy((3, 6), SOFTMAX_V2, "margin", setting)
        packed = pack_policy(policy, np.full((4, SOFTMAX_V2.width), 0.5, np.float32))
        walked = tuple(
            Walked(
                setting=each,
                risk=risk,
                p_value=0.001,
                passed=True,
                leaves=(early * 2**place / 2, early * 2**place / 2),
            )
            for place, (each, risk) in enumerate(risks.items())
        )
        proof = certificate(
            packed.digest, walked=walked, setting=setting, risk=risks[setting], p_value=0.001
        )
        publisher, measured = self.publisher, {MODEL_LAYERS: 12}
        release = publisher.release(
            packed, model="aa", tokenizer="bb", training={}, metrics=measured, certificate=proof
        )
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


def in_shadow(stage: Stage) -> None:
    canary(stage, percent=0)


def candidates(stage: Stage) -> None:
    """Two calibrated policies, one of which is better at each of its settings, and one unknown."""
    stage.publish_certified({0.9: 0.011, 0.5: 0.022, 0.2: 0.041}, early=0.2)
    stage.publish(3)
    stage.publish_certified({0.8: 0.008, 0.4: 0.019}, early=0.35)


def canary(stage: Stage, disagreed: int = 4, percent: float = 5) -> None:
    stage.publish(3)
    stage.publish(5, promote=False)
    stage.publisher.roll_out(percent)
    full: dict[str, Any] = {"joules": 6.0, "exits": {"12": 4000}}
    full |= {
        "early": 0,
        "audited": 0,
        "layers": 48_000,
        "depths": 1200.0,
        "depths_squared": 14400.0,
    }
    stage.say(AckState.ACK, 3, "", tally(1, 0, **full), tally(3, disagreed))


@contextmanager
def listening(app: FastAPI, *, is_known: bool = True) -> Iterator[str]:
    """Serve the console on a port, to a browser that cannot send its key: that is added here."""

    async def known(scope: Any, receive: Any, send: Any) -> None:
        key = (b"authorization", BEARER["Authorization"].encode())
        await app({**scope, "headers": [*scope.get("headers", []), key]}, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(known if is_known else app, log_level="warning", lifespan="off")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def look(chromium: str, url: str, shot: Path, *, is_dark: bool = False) -> None:
    """Take a picture of a page, as those see it who prefer light colours, or dark ones."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--timeout=20000",
    ]
    colours = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    size = "--window-size=1280,2000"
    profile = f"--user-data-dir={shot.parent / 'profile'}"
    subprocess.run(
        [chromium, *options, colours, size, profile, f"--screenshot={shot}", url],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
