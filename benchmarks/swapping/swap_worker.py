"""A worker process that follows a channel while its own clients stream from it without a pause."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from offramp.controller.errors import OfframpError
from offramp.controller.keys.root import load_root
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack
from offramp.controller.release.trust import ReleaseVerifier
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.spec import WorkerSpec, freeze_heap, load_engine

TOKENS = 32
"""New tokens of a request."""

CHANNEL = "swaps"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """What a worker process is started with.

    Attributes:
        name: Its name in acknowledgements, and its folder's.
        spec: What it loads.
        url: Address of the Redis server.
        trusted: File of the publisher's public key.
        folder: Parent of the workers' folders.
        clients: Streams that its clients keep open.
        prompts: What they ask, in turn.
    """

    name: str
    spec: WorkerSpec
    url: str
    trusted: Path
    folder: Path
    clients: int
    prompts: tuple[tuple[int, ...], ...]


@dataclass(slots=True, kw_only=True)
class StreamedRequest:
    """What one request got.

    Attributes:
        prompt: Number of its prompt.
        generation: The release that it was pinned to.
        audited: Whether full depth was asked about its early tokens.
        tokens: What it emitted.
        generations: Releases that its tokens say decided them.
        stamps: When each token came, seconds of the monotonic clock.
        error: Why it failed; "" if it did not.
    """

    prompt: int
    generation: int = -1
    audited: bool = False
    tokens: list[int] = field(default_factory=list)
    generations: set[int] = field(default_factory=set)
    stamps: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNews:
    """What happened in a worker since it was asked last.

    Attributes:
        requests: Those that ended.
        swaps: Start and end of each poll that changed the running release.
        audited: Audited tokens by generation, of every release that requests ran under.
        memory_mb: Resident memory of the process.
    """

    requests: list[StreamedRequest]
    swaps: list[tuple[float, float]]
    audited: dict[int, int]
    memory_mb: float


class SwapRecorder(PolicyRefresher):
    """Notes when it swapped; ``swaps`` are start and end of these polls."""

    def poll_once(self) -> Ack:
        """Poll, and note the time if another release runs from now on."""
        before, start = self.current.generation, time.monotonic()
        ack = super().poll_once()
        if self.current.generation != before:
            self.__dict__.setdefault("swaps", []).append((start, time.monotonic()))
        return ack


class BusyWorker:
    """An engine, its refresher and its clients, in one process."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        engine = load_engine(setup.spec)
        verifier = ReleaseVerifier(
            load_root(setup.trusted),
            CHANNEL,
            engine.model_fingerprint,
            engine.tokenizer_fingerprint,
            layers=engine.stack.layers,
            vocab=engine.stack.vocab,
        )
        self._refresher = SwapRecorder(
            RedisRegistry(setup.url, CHANNEL),
            verifier,
            setup.folder / setup.name,
            setup.name,
            prepare=engine.prepare,
        )
        engine.current_policy = lambda: self._refresher.current
        self._service = EngineService(engine)
        self._watches: dict[int, PolicyWatch] = {}
        self._ended: list[StreamedRequest] = []
        self._stopping = False

    def serve(self, pipe: Connection) -> None:
        """Stream until the pipe says stop; each other word is answered with the news."""
        freeze_heap()
        self._refresher.start()
        self._service.start()
        pipe.send(self._news())
        asyncio.run(self._run(pipe))
        self._refresher.stop()
        self._service.stop()

    async def _run(self, pipe: Connection) -> None:
        clients = [
            asyncio.create_task(self._client(number)) for number in range(self._setup.clients)
        ]
        while await asyncio.to_thread(pipe.recv) != "stop":
            pipe.send(self._news())
        self._stopping = True
        await asyncio.gather(*clients)
        pipe.send(self._news())

    async def _client(self, number: int) -> None:
        while not self._stopping:
            number = (number + 1) % len(self._setup.prompts)
            record = StreamedRequest(prompt=number)
            try:
                await self._stream(record)
            except OfframpError as error:
                record.error = repr(error)
            self._ended.append(record)

    async def _stream(self, record: StreamedRequest) -> None:
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        request, events = await self._service.submit(self._setup.prompts[record.prompt], sampling)
        snapshot = request.snapshot
        record.generation, record.audited = snapshot.generation, request.audited
        if snapshot.watch is not None:
            self._watches[snapshot.generation] = snapshot.watch
        async for event in events:
            record.stamps.append(time.monotonic())
            record.tokens.append(event.token)
            record.generations.add(event.generation)

    def _news(self) -> WorkerNews:
        ended, self._ended = self._ended, []
        swaps: list[tuple[float, float]] = self._refresher.__dict__.pop("swaps", [])
        audited = {each: watch.tally.audited for each, watch in self._watches.items()}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return WorkerNews(requests=ended, swaps=swaps, audited=audited, memory_mb=memory_mb)


def serve_worker(setup: WorkerSetup, pipe: Any) -> None:
    """What the worker's process runs."""
    BusyWorker(setup).serve(pipe)
