"""A worker process that follows a channel while its own clients stream from it without a pause."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from offramp.controller.keys.root import load_root
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack
from offramp.controller.release.trust import ReleaseVerifier
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.spec import WorkerSpec, freeze_heap, load_engine
from swapping.streamed import StreamedRequest, stream

SAMPLING = SamplingParams(max_tokens=32, ignore_eos=True)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNews:
    """What happened in a worker since it was asked last.

    Attributes:
        requests: Those that ended.
        swaps: Start and end of each poll that changed the running release.
        audited: Audited tokens by generation, of every release that it ran.
        memory_mb: Resident memory of the process.
    """

    requests: list[StreamedRequest]
    swaps: list[tuple[float, float]]
    audited: dict[int, int]
    memory_mb: float


class SwapRecorder(PolicyRefresher):
    """Notes when it swapped, and to what.

    Attributes:
        swaps: Start and end of these polls.
        followed: The watches of the releases, by generation.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.swaps: list[tuple[float, float]] = []
        self.followed: dict[int, PolicyWatch] = {}
        super().__init__(*arguments, **options)

    def poll_once(self) -> Ack:
        """Poll, and note the time if another release runs from now on."""
        before, start = self.current.generation, time.monotonic()
        ack = super().poll_once()
        if self.current.generation != before:
            self.swaps.append((start, time.monotonic()))
            if self.current.watch is not None:
                self.followed[self.current.generation] = self.current.watch
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
            prompt = self._setup.prompts[number]
            self._ended.append(await stream(self._service, prompt, SAMPLING))

    def _news(self) -> WorkerNews:
        ended, self._ended = self._ended, []
        swaps, self._refresher.swaps = self._refresher.swaps, []
        watches = list(self._refresher.followed.items())  # which the refresher's thread adds to
        audited = {generation: watch.tally.audited for generation, watch in watches}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return WorkerNews(requests=ended, swaps=swaps, audited=audited, memory_mb=memory_mb)


def serve_worker(setup: WorkerSetup, pipe: Any) -> None:
    """What the worker's process runs."""
    BusyWorker(setup).serve(pipe)
