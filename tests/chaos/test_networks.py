"""Slow, cut and frozen connections, a failover that loses a promotion, a disk without room."""

from __future__ import annotations

import resource
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from offramp.controller.errors import ConfigError, RegistryUnavailableError
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.redis_client import connect
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve import redis_server
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench
from support.releases.tcp_proxy import TcpProxy

PATIENCE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TcpProxy]:
    port = free_port()
    with EmbeddedRedis(tmp_path / "redis", port), TcpProxy(port).running() as proxy:
        yield proxy


@pytest.fixture
def bench(proxy: TcpProxy, tmp_path: Path) -> Iterator[Bench]:
    registry = RedisRegistry(proxy.url, "demo", timeout_s=0.5)
    yield Bench(registry, tmp_path / "home")
    registry.close()


def test_a_worker_outlives_connections_that_are_cut_slow_or_frozen(
    proxy: TcpProxy, bench: Bench
) -> None:
    head = bench.serve(3)
    worker = bench.worker()
    assert worker.poll_once().state is AckState.ACK
    proxy.cut()  # a read is tried again, on a connection of its own
    assert worker.poll_once().state is AckState.ACK
    proxy.delay_s = 0.05
    assert worker.poll_once().state is AckState.ACK
    proxy.delay_s, proxy.is_frozen = 0.0, True
    started = time.monotonic()
    assert worker.poll_once().state is AckState.STALE
    assert time.monotonic() - started < 10.0  # each wait is bounded
    assert (worker.current.generation, worker.current.digest) == (1, head.digest)
    assert worker.unreported
    with pytest.raises(RegistryUnavailableError):
        bench.serve(5)
    proxy.is_frozen = False
    proxy.cut()
    assert worker.poll_once().state is AckState.ACK
    proxy.is_closed = True
    proxy.cut()
    assert worker.poll_once().state is AckState.STALE
    proxy.is_closed = False
    bench.serve(5)
    assert worker.poll_once().generation == 2


def test_a_promotion_whose_answer_is_lost_is_served(
    proxy: TcpProxy, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(3)
    release = bench.release(5)
    call = bench.registry._client.eval  # type: ignore[attr-defined]  # the one call that promotes

    def cut_off(*arguments: Any) -> Any:
        call(*arguments)
        proxy.cut()
        raise redis.ConnectionError("the answer never came")

    monkeypatch.setattr(bench.registry._client, "eval", cut_off)  # type: ignore[attr-defined]
    bench.publisher.promote(release.generation)
    assert bench.worker().poll_once().generation == 2


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[str, int, int]]:
    """A primary with a replica under a sentinel: its address, and the ports of both."""
    first, second, watcher = free_port(), free_port(), free_port()
    rules = tmp_path / "sentinel.conf"
    rules.write_text(
        f"port {watcher}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {first} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
    )
    with EmbeddedRedis(tmp_path / "a", first), EmbeddedRedis(tmp_path / "b", second):
        with redis.Redis(port=second) as client:
            client.replicaof("127.0.0.1", first)
            assert eventually(lambda: client.info("replication")["master_link_status"] == "up")
        binary = str(redis_server._bundled_binary())
        process = subprocess.Popen([binary, str(rules), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            yield f"redis+sentinel://127.0.0.1:{watcher}/main", first, second
        finally:
            process.kill()
            process.wait()


def test_a_failover_that_loses_the_promotion_is_refused_and_healed(
    pair: tuple[str, int, int], tmp_path: Path
) -> None:
    url, first, second = pair
    registry = RedisRegistry(url, "demo", timeout_s=0.5)
    bench = Bench(registry, tmp_path / "home")
    with redis.Redis(port=first) as primary, redis.Redis(port=second) as replica:
        assert eventually(lambda: _knows_its_replica(url))
        bench.serve(3)
        worker = bench.worker()
        assert worker.poll_once().generation == 1
        assert eventually(lambda: bool(replica.exists("offramp:{demo}:head")))
        primary.execute_command("CLIENT", "KILL", "TYPE", "REPLICA")
        replica.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))  # cut off, unnoticed
        head = bench.serve(5)
        assert worker.poll_once().generation == 2
        replica.execute_command("REPLICAOF", "NO", "ONE")
        primary.shutdown(nosave=True)
        # The sentinel finds the primary gone and takes the other, which never had generation 2.
        assert eventually(lambda: _is_taken(registry, head.generation - 1))
    ack = worker.poll_once()
    assert ack.state is not AckState.ACK, ack
    assert (worker.current.generation, worker.current.digest) == (2, head.digest)
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


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis+sentinel://host:26379", "names no primary"),
        ("redis+sentinel://host/main", "'host' is no sentinel's HOST:PORT"),
        ("redis+sentinel://u:secret@host:26379,:1/main", "':1' is no sentinel's HOST:PORT"),
        ("redis+sentinel://host:26379/main/zero", "zero"),
    ],
)
def test_addresses_of_sentinels_that_are_none(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match="REDIS_URL") as refused:
        connect(url, 1.0, 1.0)
    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_disk_that_takes_no_more_keeps_what_runs_and_is_healed_by_room(bench: Bench) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    bench.serve(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # the kernel takes no byte of any file
    try:
        ack = worker.poll_once()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ack.state, worker.current.policy) == (AckState.STALE, FixedExit(3))
    assert "File too large" in ack.reason
    assert worker.poll_once().generation == 2
    assert bench.worker().current.policy == FixedExit(5)
