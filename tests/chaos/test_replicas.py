"""A replica: one that workers are pointed at, and one that takes over without a promotion."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve import redis_server
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench
from support.releases.scene import Ask
from support.releases.waiting import eventually, free_port

HEAD = "offramp:{demo}:head"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[EmbeddedRedis, EmbeddedRedis]]:
    """A primary, and a replica that has caught up."""
    first, second = (EmbeddedRedis(tmp_path / name, free_port()) for name in "ab")
    with first, second, redis.Redis.from_url(second.url) as client:
        client.replicaof("127.0.0.1", port_of(first))
        assert eventually(lambda: client.info("replication")["master_link_status"] == "up")
        yield first, second


def port_of(server: EmbeddedRedis) -> int:
    return int(server.url.split(":")[2].split("/")[0])


def test_a_worker_on_a_replica_follows_and_cannot_report(
    two: tuple[EmbeddedRedis, EmbeddedRedis], tmp_path: Path, ask: Ask
) -> None:
    primary, replica = two
    writing, reading = (RedisRegistry(each.url, "demo", timeout_s=2.0) for each in two)
    bench = Bench(writing, tmp_path / "home")
    there = redis.Redis.from_url(replica.url)
    bench.serve(3)
    assert eventually(lambda: bool(there.exists(HEAD)))
    bench.registry = reading  # the publisher keeps the primary
    worker = bench.worker()
    clients = ask(bench)
    clients.follow(worker)
    for generation in (1, 2):
        assert eventually(lambda g=generation: worker.poll_once().generation == g)  # type: ignore[misc]
        assert worker.report.state is AckState.ACK
        assert (worker.report.generation, worker.report.reason) == (generation, "")
        assert "is a read-only replica" in worker.unreported
        assert "Name the primary" in worker.unreported
        assert clients.generations() == {generation}
        if generation == 1:
            bench.serve(4)
    assert reading.acks() == []
    mistaken = Bench(reading, tmp_path / "home").publisher
    with pytest.raises(RegistryUnavailableError, match=r"REDIS_URL.*read-only replica") as refused:
        mistaken.promote(2)
    assert "Name the primary" in str(refused.value)
    primary.__exit__(None, None, None)
    assert worker.poll_once().state is AckState.ACK  # until its timestamp expires
    there.config_set("replica-serve-stale-data", "no")
    assert worker.poll_once().state is AckState.STALE
    assert "MASTER is down" in worker.report.reason
    assert clients.generations() == {2}
    there.replicaof("NO", "ONE")
    assert worker.poll_once().state is AckState.ACK
    assert worker.unreported == ""
    assert [ack.generation for ack in reading.acks()] == [2]
    for each in (writing, reading, there):
        each.close()


@pytest.fixture
def pair(
    two: tuple[EmbeddedRedis, EmbeddedRedis], tmp_path: Path
) -> Iterator[tuple[str, int, int]]:
    """Both under a sentinel: its address, and their ports."""
    (first, second), watcher = map(port_of, two), free_port()
    rules = tmp_path / "sentinel.conf"
    rules.write_text(
        f"port {watcher}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {first} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
    )
    binary = str(redis_server._bundled_binary())
    process = subprocess.Popen([binary, str(rules), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield f"redis+sentinel://127.0.0.1:{watcher}/main", first, second
    finally:
        process.kill()
        process.wait()


def test_a_failover_that_loses_the_promotion_is_refused_and_healed(
    pair: tuple[str, int, int], tmp_path: Path, ask: Ask
) -> None:
    url, first, second = pair
    registry = RedisRegistry(url, "demo", timeout_s=2.0)
    bench = Bench(registry, tmp_path / "home")
    with redis.Redis(port=first) as primary, redis.Redis(port=second) as replica:
        assert eventually(lambda: _knows_its_replica(url))
        bench.serve(3)
        worker = bench.worker()
        assert worker.poll_once().generation == 1
        clients = ask(bench)
        clients.follow(worker)
        assert eventually(lambda: bool(replica.exists("offramp:{demo}:head")))
        primary.execute_command("CLIENT", "KILL", "TYPE", "REPLICA")
        replica.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))  # cut off, unnoticed
        head = bench.serve(4)
        assert worker.poll_once().generation == 2
        replica.execute_command("REPLICAOF", "NO", "ONE")
        primary.shutdown(nosave=True)
        # The sentinel finds the primary gone and takes the other, which never had generation 2.
        assert eventually(lambda: _is_taken(registry, head.generation - 1))
    ack = worker.poll_once()
    assert ack.state is not AckState.ACK, ack
    assert (worker.current.generation, worker.current.digest) == (2, head.digest)
    assert clients.generations() == {2}
    bench.publisher.promote(2)
    assert worker.poll_once().state is AckState.ACK
    assert bench.worker().poll_once().generation == 2
    registry.close()


def _knows_its_replica(url: str) -> bool:
    port = int(url.split(":")[2].split("/")[0])
    with redis.Redis(port=port) as sentinel:
        try:
            return bool(sentinel.sentinel_master("main")["num-slaves"])
        except redis.RedisError:
            return False


def _is_taken(registry: RedisRegistry, generation: int) -> bool:
    try:
        head = registry.head()
    except RegistryUnavailableError:
        return False
    return head is not None and head.generation == generation
