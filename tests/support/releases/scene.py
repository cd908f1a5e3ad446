"""A Redis of its own, a channel on it, and a worker whose clients never pause."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import redis

from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench
from support.releases.clients import Clients
from support.releases.waiting import free_port

Ask = Callable[[Bench], Clients]


class Scene:
    """A Redis on one port, a channel on it, and a worker whose clients never pause."""

    def __init__(self, folder: Path, ask: Ask, binary: Path | None = None) -> None:
        self.data = folder / "redis"
        self.server = EmbeddedRedis(self.data, free_port(), binary)
        self.server.__enter__()
        self.registry = RedisRegistry(self.server.url, "demo", timeout_s=2.0)
        self.bench = Bench(self.registry, folder)
        self.bench.serve(2)
        self.worker = self.bench.worker()
        assert self.worker.poll_once().state is AckState.ACK
        self.clients = ask(self.bench)
        self.clients.follow(self.worker)
        assert self.clients.generations() == {1}

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.server.url)

    def says(self) -> tuple[AckState, int]:
        """What the worker says now; it serves under no other release."""
        ack = self.worker.poll_once()
        assert self.clients.generations() == {ack.generation}
        return ack.state, ack.generation

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.__exit__(None, None, None)
        before = self.worker.current.generation
        assert self.says() == (AckState.STALE, before)

    def start(self) -> None:
        self.server.__enter__()
