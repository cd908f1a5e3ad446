"""The simulated fleet: real workers and a real Redis on a clock that is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from swapping.fleet import MEASURED_S, PATIENCE_S, Fleet, FleetRow
from swapping.simulated_redis import ServerCosts
from swapping.simulated_time import SimulatedTime

from offramp.deploy.serve.redis_server import EmbeddedRedis

CHEAP = ServerCosts(command_s=1e-6, byte_s=1e-10)
SLOW = ServerCosts(command_s=1e-6, byte_s=1e-6)
WORKERS = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


def scenes(folder: Path, server: EmbeddedRedis, costs: ServerCosts) -> tuple[Fleet, list[FleetRow]]:
    random.seed(0)
    fleet = Fleet(folder, server.url, WORKERS, costs)
    with fleet.living():
        return fleet, [fleet.quiet(), fleet.publish(1000), fleet.outage(1000)]


def test_threads_wait_in_simulated_time_alone() -> None:
    clock = SimulatedTime()
    told: list[tuple[str, float]] = []
    happened = clock.threading.Event()

    def wait(name: str, timeout_s: float) -> None:
        told.append((f"{name} {happened.wait(timeout_s)}", clock.now_s))

    clock.begin(lambda: wait("patient", 1000.0))
    clock.begin(lambda: wait("impatient", 10.0))
    clock.begin(happened.set, 500.0)
    clock.run(2000.0)
    assert told == [("impatient False", 10.0), ("patient True", 500.0)]
    clock.end()


def test_a_fleet_converges_and_the_load_is_the_servers_own_count(
    tmp_path: Path, server: EmbeddedRedis
) -> None:
    fleet, (quiet, published, recovered) = scenes(tmp_path, server, CHEAP)
    assert published.reached == recovered.reached == WORKERS
    assert published.all_s < 0.1  # a wake-up, and no poll, told them
    assert 1.0 < recovered.all_s < 7.0  # a poll did: 5 s with its jitter
    # Waiting reads last half a second, polls come every five.
    assert WORKERS * MEASURED_S * 2 < quiet.commands < WORKERS * MEASURED_S * 6
    facts: Any = fleet.server.real.info("commandstats")
    acknowledged = facts["cmdstat_hset"]["calls"] - 3  # a head each
    assert acknowledged == facts["cmdstat_pexpire"]["calls"] >= 3 * WORKERS
    assert set(fleet.server.states.values()) == {"ACK"}


def test_workers_that_overload_the_server_still_converge(
    tmp_path: Path, server: EmbeddedRedis
) -> None:
    random.seed(0)
    fleet = Fleet(tmp_path, server.url, WORKERS, SLOW)
    with fleet.living():
        # Each policy takes the thread 0.6 s, and whoever waits for longer than 1 s goes away.
        row = fleet.publish(600_000)
    assert row.late > 0
    assert row.reached == WORKERS
    assert row.all_s < PATIENCE_S
