"""One channel's workers, up to ten thousand, on a simulated clock and a real Redis server.

The refresher, registry, verifier, keeper and folder of each worker are the product's own code; see
``simulated_time`` and ``simulated_redis`` for what is not.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import redis

from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release import redis_registry
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.worker.following import keeper, refresh, telling
from offramp.worker.following.refresh import PolicyRefresher
from swapping.simulated_redis import (
    BIN_S,
    ServerCosts,
    ServerLoad,
    SimulatedClient,
    SimulatedServer,
)
from swapping.simulated_time import SimulatedTime

CHANNEL = "fleet"
MODEL, TOKENIZER = "aa", "bb"

SETTLED_S = 7.0
"""Simulated seconds after which the workers' polls are spread as they stay."""

MEASURED_S = 5.0
"""Simulated seconds of a quiet time that are counted."""

OUTAGE_S = 12.0
PATIENCE_S = 120.0
STEP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRow:
    """What a fleet did in one scene.

    Attributes:
        scene: What happened.
        workers: Size of the fleet.
        blob_bytes: Size of the policy.
        reached: Workers that acknowledged, in two minutes at most.
        half_s: Simulated seconds until half of the workers had acknowledged.
        p99_s: Until 99 % had.
        all_s: Until all had.
        commands: Commands that the server got in that time.
        peak_per_s: Most of them in a tenth of a second, times ten.
        megabytes: What it read and wrote in that time.
        held_mb: Most answers held in its memory at once.
        longest_ms: Longest wait for its thread.
        late: Commands whose client had gone away.
    """

    scene: str
    workers: int
    blob_bytes: int
    reached: int
    half_s: float
    p99_s: float
    all_s: float
    commands: int
    peak_per_s: float
    megabytes: float
    held_mb: float
    longest_ms: float
    late: int


class Fleet:
    """The workers, their publisher and their Redis.

    Args:
        folder: For keys, ledger and the workers' folders; best in memory.
        url: The real Redis server.
        workers: How many there are.
        costs: What the server's thread needs.
    """

    def __init__(self, folder: Path, url: str, workers: int, costs: ServerCosts) -> None:
        self.clock = SimulatedTime()
        self.server = SimulatedServer(self.clock, url, costs)
        self._workers = workers
        self._folder = folder
        key = load_or_create_key(folder / "key.pem")
        self._trusted = trusted_keys(key.public_bytes)
        self._publisher = Publisher(
            RedisRegistry(url, CHANNEL, 30.0),
            FolderLedger(folder / "ledger"),
            key,
            CHANNEL,
            self.clock.time.time,
        )
        self._layer = 0

    @contextlib.contextmanager
    def living(self) -> Iterator[None]:
        """Start every worker, within the time of a poll, and wait until they have settled."""
        with contextlib.ExitStack() as held:
            for module in (refresh, keeper, telling, redis_registry):
                for name in ("time", "threading"):
                    if hasattr(module, name):
                        stand_in = getattr(self.clock, name)
                        held.enter_context(mock.patch.object(module, name, stand_in))
            held.enter_context(mock.patch.object(redis_registry, "connect", self._connect))
            self._publish()
            for number in range(self._workers):
                worker = self._worker(number)
                # What start() would do in a thread of its own.
                self.clock.begin(worker._run, random.uniform(0, refresh.POLL_S))
            self.clock.run(SETTLED_S)
            try:
                yield
            finally:
                self.clock.end()

    def _connect(self, url: str, connect_s: float, socket_s: float) -> SimulatedClient:
        del url, connect_s
        return SimulatedClient(self.server, socket_s)

    def _worker(self, number: int) -> PolicyRefresher:
        verifier = ReleaseVerifier(self._trusted, CHANNEL, MODEL, TOKENIZER, self.clock.time.time)
        # Each on a machine of its own, so none reads its neighbours' folders.
        folder = self._folder / f"machine-{number}" / "worker-0"
        return PolicyRefresher(
            RedisRegistry("redis://simulated", CHANNEL), verifier, folder, f"worker-{number}"
        )

    def _publish(self) -> int:
        self._layer += 1
        head = self._publisher.release(
            pack_policy(FixedExit(self._layer), np.zeros((2, 3), np.float32)),
            model=MODEL,
            tokenizer=TOKENIZER,
            training={},
            metrics={},
            uncertified=True,
        )
        self._publisher.promote(head.generation)
        self.server.promoted()
        return head.generation

    def quiet(self) -> FleetRow:
        """Count the load while nothing happens."""
        start_s, counted = self._begin_counting()
        self.clock.run(start_s + MEASURED_S)
        return self._row("quiet", counted, [MEASURED_S] * self._workers)

    def publish(self, blob_bytes: int) -> FleetRow:
        """Serve another policy of that size, and wait until every worker runs it."""
        self.server.blob_bytes = blob_bytes
        return self._converge("publish")

    def outage(self, blob_bytes: int) -> FleetRow:
        """Take the server away, publish as it returns, and wait until every worker runs that."""
        self.server.blob_bytes = blob_bytes
        self.server.stop()
        self.clock.run(self.clock.now_s + OUTAGE_S)
        self.server.start()
        return self._converge("after an outage")

    def _converge(self, scene: str) -> FleetRow:
        start_s, counted = self._begin_counting()
        generation = self._publish()
        told = self.server.told.setdefault(generation, {})
        while len(told) < self._workers and self.clock.now_s - start_s < PATIENCE_S:
            self.clock.run(self.clock.now_s + STEP_S)
        at = [each - start_s for each in told.values()]
        return self._row(scene, counted, at + [PATIENCE_S] * (self._workers - len(at)))

    def _begin_counting(self) -> tuple[float, int]:
        self.server.load = ServerLoad()
        return self.clock.now_s, _bytes_of(self.server.real)

    def _row(self, scene: str, bytes_before: int, at: list[float]) -> FleetRow:
        load = self.server.load
        size = _bytes_of(self.server.real) - bytes_before + load.sent
        half_s, p99_s = np.quantile(at, [0.5, 0.99])
        return FleetRow(
            scene=scene,
            workers=self._workers,
            blob_bytes=self.server.blob_bytes,
            reached=sum(each < PATIENCE_S for each in at),
            half_s=float(half_s),
            p99_s=float(p99_s),
            all_s=max(at),
            commands=sum(load.commands.values()),
            peak_per_s=max(load.commands.values()) / BIN_S,
            megabytes=size / 1e6,
            held_mb=load.held / 1e6,
            longest_ms=1e3 * load.longest_s,
            late=load.late,
        )


def _bytes_of(server: redis.Redis) -> int:
    facts: Any = server.info("stats")
    return int(facts["total_net_input_bytes"] + facts["total_net_output_bytes"])
