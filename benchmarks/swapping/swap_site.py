"""A publisher, a real Redis and worker processes, as ``hot_swap.py`` moves them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from offramp.controller.keys.key_files import load_or_create_key, save_public_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import ExitPolicy
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.controller.watching.overseer import Overseer
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker.decoding.request import FULL_DEPTH, KVMode
from offramp.worker.spec import ModelFacts, WorkerSpec, describe, load_engine
from swapping.streamed import StreamedRequest, replay
from swapping.swap_worker import CHANNEL, SAMPLING, WorkerNews, WorkerSetup, serve_worker

PROMPTS = 8
PROMPT_TOKENS = 24
PATIENCE_S = 120.0


class SwapSite:
    """The channel, and its workers under load.

    Args:
        folder: For keys, ledger, Redis and workers.
        spec: What each worker loads.
        workers: Number of worker processes.
        clients: Streams per worker.

    Attributes:
        engine: What decodes requests again, alone.
        served: Policy of each generation released here.
        tripped: Generations that workers took out of service while requests ran under them.
    """

    def __init__(self, folder: Path, spec: WorkerSpec, workers: int, clients: int) -> None:
        self._folder, self._spec = folder, spec
        self._names = [f"w{number}" for number in range(workers)]
        self._clients = clients
        self.engine = load_engine(spec)
        self.facts: ModelFacts = describe(self.engine)
        self.served: dict[int, ExitPolicy] = {}
        self.tripped: set[int] = set()
        self._pipes: list[Connection] = []
        files = sorted(Path("controller").rglob("*.py"), key=lambda path: path.stat().st_size)
        texts = [path.read_text(encoding="utf-8") for path in files[-PROMPTS:]]
        tokens = [self.engine.tokenizer.encode(text[:200])[:PROMPT_TOKENS] for text in texts]
        self._prompts = tuple(map(tuple, tokens))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start Redis and the workers, and end them."""
        self._port = _free_port()
        self._redis = EmbeddedRedis(self._folder / "redis", self._port)
        key = load_or_create_key(self._folder / "key.pem")
        save_public_keys(self._folder / "key.pub", key.public_bytes)
        self._redis.__enter__()
        self.registry = RedisRegistry(self._redis.url, CHANNEL, 5.0)
        ledger = FolderLedger(self._folder / "ledger")
        self.publisher = Publisher(self.registry, ledger, key, CHANNEL)
        processes = []
        try:
            context = multiprocessing.get_context("spawn")
            for name in self._names:
                pipe, theirs = context.Pipe()
                process = context.Process(target=serve_worker, args=(self._setup(name), theirs))
                process.start()
                processes.append(process)
                self._pipes.append(pipe)
            for pipe in self._pipes:
                pipe.recv()
            yield
        finally:
            for process in processes:
                process.kill()
            self.registry.close()
            self._redis.__exit__(None, None, None)

    def _setup(self, name: str) -> WorkerSetup:
        return WorkerSetup(
            name=name,
            spec=self._spec,
            url=self._redis.url,
            trusted=self._folder / "key.pub",
            folder=self._folder / "workers",
            clients=self._clients,
            prompts=self._prompts,
        )

    def news(self, word: str = "news") -> list[WorkerNews]:
        """What each worker has to tell since it was asked last."""
        for pipe in self._pipes:
            pipe.send(word)
        return [pipe.recv() for pipe in self._pipes]

    def publish(self, policy: ExitPolicy, width: int = 3) -> int:
        """Release a policy and promote it, uncertified; returns its generation."""
        head = self.publisher.release(
            pack_policy(policy, np.zeros((4, width), np.float32)),
            model=self.facts.model,
            tokenizer=self.facts.tokenizer,
            training={},
            metrics={},
            uncertified=policy.exits != (),
        )
        self.served[head.generation] = policy
        self.publisher.promote(head.generation)
        return head.generation

    def await_all(self, generation: int, started: float) -> float:
        """Seconds from ``started`` (unix) until every worker had acknowledged a generation."""
        deadline = time.monotonic() + PATIENCE_S
        seen: dict[str, float] = {}
        while len(seen) < len(self._names):
            for ack in self.registry.acks():
                if ack.generation == generation and ack.state is AckState.ACK:
                    seen.setdefault(ack.worker, ack.at)
            if time.monotonic() > deadline:
                said = [f"{ack.worker}: {ack.state} {ack.reason}" for ack in self.registry.acks()]
                raise SystemExit(f"generation {generation} is not acknowledged by all: {said}")
            time.sleep(0.01)
        return max(seen.values()) - started

    def kill_redis(self) -> None:
        """End the server as a crash would."""
        os.kill(self._redis.pid, signal.SIGKILL)

    def restart_redis(self) -> None:
        """Start it again, empty, and put back what the ledger has."""
        self._redis.__exit__(None, None, None)
        self._redis = EmbeddedRedis(self._folder / f"redis-{time.monotonic_ns()}", self._port)
        self._redis.__enter__()
        self.publisher.promote(self.publisher.promoted)

    def overseer(self) -> Overseer:
        """The watch that rolls back what two workers tripped on."""
        return Overseer(self.publisher, self.registry, 2)

    def torn(self, requests: list[StreamedRequest]) -> list[StreamedRequest]:
        """Those that more than one release decided, or whose tokens a replay does not give."""
        replays: dict[tuple[tuple[int, ...], int, KVMode], list[int]] = {}
        found = []
        for each in requests:
            if each.error:
                continue
            # The first token comes from the prompt; it says the generation that it is pinned to.
            policy = self.served.get(each.generation, FULL_DEPTH.policy)
            key = (each.prompt, policy.exits[0] if policy.exits else 0, each.kv_mode)
            if key not in replays:
                again = replay(self.engine, each.prompt, policy, each.kv_mode, SAMPLING)
                replays[key] = again.emitted
            is_other = each.tokens != replays[key] and each.generation not in self.tripped
            if is_other or each.generations != {each.generation}:
                found.append(each)
        return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
