"""Redis started again with and without its data, from an old dump, with a password.

Real servers and processes: whatever Redis comes back with, requests under way and new ones end, and
the worker says what it knows.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.following.refresh import PolicyRefresher
from support.models import make_model
from support.releases.channel import Bench

GREEDY = SamplingParams(max_tokens=4, ignore_eos=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Scene:
    """A Redis on one port, a channel on it, and a worker with its engine."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "redis"
        self.server = EmbeddedRedis(self.data, free_port())
        self.server.__enter__()
        self.registry = RedisRegistry(self.server.url, "demo", timeout_s=0.5)
        self.bench = Bench(self.registry, folder)
        self.bench.serve(2)
        self.worker: PolicyRefresher = self.bench.worker()
        self.engine = AdaptiveEngine.from_pretrained(
            make_model("llama"), slots=2, current_policy=lambda: self.worker.current
        )
        assert self.worker.poll_once().state is AckState.ACK

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.server.url)

    def serves(self, generation: int) -> bool:
        """Whether a request is answered whole, under this release."""
        [answer] = self.engine.generate([5, 6], GREEDY)
        return len(answer.token_ids) == 4 and answer.stats.generation == generation

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.__exit__(None, None, None)
        state = self.worker.poll_once()
        assert (state.state, state.generation) == (AckState.STALE, 1)
        assert self.serves(1)

    def start(self) -> None:
        self.server.__enter__()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    scene.registry.close()
    scene.server.__exit__(None, None, None)


def test_it_comes_back_empty_and_a_promotion_fills_it(scene: Scene) -> None:
    scene.kill()
    (scene.data / "dump.rdb").unlink(missing_ok=True)
    scene.start()
    state = scene.worker.poll_once()
    assert (state.state, state.generation) == (AckState.STALE, 1)
    assert scene.serves(1)
    scene.bench.publisher.promote(1)
    assert scene.worker.poll_once().state is AckState.ACK
    assert scene.serves(1)


def test_it_comes_back_with_an_old_dump(scene: Scene, tmp_path: Path) -> None:
    scene.client.save()
    shutil.copy(scene.data / "dump.rdb", tmp_path / "old.rdb")
    scene.bench.serve(3)
    assert scene.worker.poll_once().generation == 2
    os.kill(scene.server.pid, signal.SIGKILL)
    scene.server.__exit__(None, None, None)
    shutil.copy(tmp_path / "old.rdb", scene.data / "dump.rdb")
    scene.start()
    state = scene.worker.poll_once()
    assert (state.state, state.generation) == (AckState.NACK, 2)
    assert state.reason.startswith("rollback")
    assert scene.serves(2)
    scene.bench.publisher.promote(2)
    assert scene.worker.poll_once().state is AckState.ACK


def test_a_password_that_changed(scene: Scene) -> None:
    scene.client.config_set("requirepass", "another")
    scene.registry._client.connection_pool.disconnect()
    state = scene.worker.poll_once()
    assert (state.state, state.generation) == (AckState.STALE, 1)
    assert scene.serves(1)
    redis.Redis.from_url(scene.server.url, password="another").config_set("requirepass", "")
    assert scene.worker.poll_once().state is AckState.ACK
    assert scene.serves(1)
