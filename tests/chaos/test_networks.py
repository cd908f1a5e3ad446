"""Slow, cut and frozen connections, a server that stands still, a disk without room."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from offramp.controller.errors import ConfigError, RegistryUnavailableError
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.redis_client import connect
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench
from support.releases.scene import Ask
from support.releases.tcp_proxy import TcpProxy
from support.releases.waiting import eventually, free_port


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[TcpProxy]:
    port = free_port()
    with EmbeddedRedis(tmp_path / "redis", port), TcpProxy(port).running() as proxy:
        yield proxy


@pytest.fixture
def bench(proxy: TcpProxy, tmp_path: Path) -> Iterator[Bench]:
    registry = RedisRegistry(proxy.url, "demo", timeout_s=2.0)
    yield Bench(registry, tmp_path / "home")
    registry.close()


def test_a_worker_outlives_connections_that_are_cut_slow_or_frozen(
    proxy: TcpProxy, bench: Bench, ask: Ask
) -> None:
    head = bench.serve(3)
    worker = bench.worker()
    assert worker.poll_once().state is AckState.ACK
    clients = ask(bench)
    clients.follow(worker)
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
    assert clients.generations() == {1}
    with pytest.raises(RegistryUnavailableError):
        bench.serve(4)
    proxy.is_frozen = False
    proxy.cut()
    assert worker.poll_once().state is AckState.ACK
    proxy.is_closed = True
    proxy.cut()
    assert worker.poll_once().state is AckState.STALE
    assert clients.generations() == {1}
    proxy.is_closed = False
    bench.serve(4)
    assert worker.poll_once().generation == 2
    assert clients.generations() == {2}


def test_a_server_that_stands_still_and_goes_on(tmp_path: Path, ask: Ask) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        registry = RedisRegistry(server.url, "demo", timeout_s=3.0)
        bench = Bench(registry, tmp_path / "home")
        bench.serve(3)
        worker = bench.worker()
        worker.poll_once()
        clients = ask(bench)
        clients.follow(worker)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert worker.poll_once().state is AckState.STALE
            assert clients.generations() == {1}
        finally:
            os.kill(server.pid, signal.SIGCONT)
        with redis.Redis.from_url(server.url) as patient:
            patient.ping()  # on a busy machine it wakes up later than the registry waits
        bench.serve(4)
        assert eventually(lambda: worker.poll_once().state is AckState.ACK)
        assert clients.generations() == {2}
        registry.close()


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


def test_a_disk_that_takes_no_more_keeps_what_runs_and_is_healed_by_room(
    bench: Bench, ask: Ask
) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    clients = ask(bench)
    clients.follow(worker)
    bench.serve(4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # the kernel takes no byte of any file
    try:
        ack = worker.poll_once()
        assert clients.generations() == {1}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ack.state, worker.current.policy) == (AckState.STALE, FixedExit(3))
    assert "File too large" in ack.reason
    assert worker.poll_once().generation == 2
    assert clients.generations() == {2}
    assert bench.worker().current.policy == FixedExit(4)
