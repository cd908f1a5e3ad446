"""A long mixed load: swaps, clients that leave, a worker that is killed; what comes of it all."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from serving.serve_rows import ServeRow, row
from serving.served_process import ServerProcess, fds, rss_mb
from serving.steady_state import prompts
from serving.stream_client import asked

from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.deploy.serve.publishing import open_publisher, open_registry
from offramp.deploy.serve.settings import Settings
from offramp.worker.spec import ModelFacts

STREAMS = 6
"""Requests under way at any time; the pool has room for all."""

SWAP_S = 20.0
SAMPLE_S = 5.0
SETTLED = 0.3
"""Share of a process's samples that are its warming up."""

STEADY_S = 60.0
"""Only processes that were seen for so long have a slope."""


class Soak:
    """One run.

    Args:
        server: A pool of two workers.
        home: Its OFFRAMP_HOME.
        redis_url: Its Redis.
        facts: Its model.
        seconds: How long it takes.
    """

    def __init__(
        self, server: ServerProcess, home: Path, redis_url: str, facts: ModelFacts, seconds: float
    ) -> None:
        self._server, self._facts, self._seconds = server, facts, seconds
        settings = Settings(home=home, redis_url=redis_url)
        self._publisher = open_publisher(settings, open_registry(settings))
        self._ends: Counter[str] = Counter()
        self._held: dict[str, list[tuple[float, float]]] = {}
        self._swaps = 0
        self._draw = random.Random(0)

    async def run(self) -> list[ServeRow]:
        """Rows of what came of requests, and of memory and descriptors."""
        await self._server.idle(workers=2)
        before = fds(self._server.speakers())
        end_s = time.monotonic() + self._seconds
        works = [self._ask(end_s) for _ in range(STREAMS)]
        await asyncio.gather(*works, self._swap(end_s), self._sample(end_s), self._kill())
        idle_s = await self._server.idle(workers=2)
        await asyncio.sleep(3.0)
        more = fds(self._server.speakers()) - before
        total = sum(self._ends.values())
        kinds = sorted(self._ends.items())
        return [
            *(row(f"soak: {kind}", STREAMS, count, "requests", total) for kind, count in kinds),
            row("soak: policies swapped", STREAMS, self._swaps, "releases"),
            row("soak: nothing under way after", STREAMS, idle_s, "s"),
            row("soak: file descriptors more than before", STREAMS, more, "descriptors"),
            *self._slopes(),
        ]

    async def _ask(self, end_s: float) -> None:
        """Requests one after the other, one in ten given up half-way."""
        while time.monotonic() < end_s:
            body = asked(prompts(1, self._draw.randrange(999))[0], self._draw.randrange(10, 120))
            try:
                if self._draw.random() < 0.1:
                    within_s = self._draw.random()
                    asking = self._server.client.stream(body)
                    streamed = await asyncio.wait_for(asking, within_s)
                else:
                    streamed = await self._server.client.stream(body)
            except TimeoutError:
                self._ends["given up by the client"] += 1
                continue
            self._ends[streamed.end] += 1

    async def _swap(self, end_s: float) -> None:
        while time.monotonic() < end_s:
            policy = FixedExit(3 + self._swaps % 6)
            release = self._publisher.release(
                pack_policy(policy, np.zeros((4, 3), np.float32)),
                model=self._facts.model,
                tokenizer=self._facts.tokenizer,
                training={},
                metrics={},
                uncertified=True,
            )
            self._publisher.promote(release.generation)
            self._swaps += 1
            await asyncio.sleep(SWAP_S)

    async def _sample(self, end_s: float) -> None:
        began_s = time.monotonic()
        while time.monotonic() < end_s:
            for name, held in rss_mb(self._server.speakers()).items():
                # Ray renames its processes by what they do; their numbers stay.
                kind, pid = "front" if "Front" in name else "worker", name.rpartition(":")[2]
                samples = self._held.setdefault(f"{kind} {pid}", [])
                samples.append((time.monotonic() - began_s, held))
            await asyncio.sleep(SAMPLE_S)

    async def _kill(self) -> None:
        await asyncio.sleep(self._seconds / 3)
        with suppress(psutil.NoSuchProcess):
            self._server.workers()[0].kill()

    def _slopes(self) -> list[ServeRow]:
        """How fast memory grows once a process is warm."""
        rows = []
        for name, samples in sorted(self._held.items()):
            warm = samples[int(len(samples) * SETTLED) :]
            if samples[-1][0] - samples[0][0] >= STEADY_S:
                seconds, held = zip(*warm, strict=True)
                slope = float(np.polyfit(seconds, held, 1)[0]) * 60
                label = f"soak: {name} grows by, from {held[0]:.0f} MiB on"
                rows.append(row(label, STREAMS, slope, "MiB/min"))
        return rows
