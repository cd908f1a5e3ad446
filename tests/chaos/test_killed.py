"""Processes that are killed at every single step of what they write, and then start again.

Each run is a process of its own that ends by SIGKILL at the n-th call that changes a file or the
registry; n goes up until a run comes to its end.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.models import LAYERS
from support.releases.adaptable import SETTINGS, moved_to, released
from support.releases.channel import Bench
from support.releases.clients import LoneClient, torn

FORK = multiprocessing.get_context("fork")
CHANGES = ("replace", "link", "unlink", "fsync")
"""Calls of ``os`` that change what a later start finds."""

DEATHS = int(os.environ.get("OFFRAMP_TEST_DEATHS", "40"))
"""How often a worker is killed; ``make chaos`` says 200."""

REGISTRY_CHANGES = ("put_blob", "promote", "stamp", "discard_head", "acknowledge")


def mortal(owner: Any, name: str, lives: list[int]) -> None:
    """Let a call kill the process once its lives are used up: before it is carried out."""
    call = getattr(owner, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        lives[0] -= 1
        if lives[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    setattr(owner, name, dying)


def run_and_die(work: Callable[[Bench], object], url: str, folder: Path, lives: int) -> None:
    left = [lives]
    registry = RedisRegistry(url, "demo")
    bench = Bench(registry, folder)
    for name in CHANGES:
        mortal(os, name, left)
    for name in REGISTRY_CHANGES:
        mortal(registry, name, left)
    work(bench)


def died(work: Callable[[Bench], object], url: str, folder: Path, lives: int) -> bool:
    """Whether the run was killed; a run that fails by itself fails the test."""
    process = FORK.Process(target=run_and_die, args=(work, url, folder, lives))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server.url


@pytest.fixture
def bench(url: str, tmp_path: Path) -> Iterator[Bench]:
    registry = RedisRegistry(url, "demo")
    yield Bench(registry, tmp_path / "home")
    registry.close()


def deaths_of(work: Callable[[Bench], object], url: str, folder: Path) -> Iterator[int]:
    """Yields after each death; ends after the first run that lives."""
    lives = 0
    while died(work, url, folder, lives):
        yield lives
        lives += 1


def publish(bench: Bench) -> None:
    bench.serve(5)


def test_a_publisher_killed_at_any_step_can_be_run_again(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    bench.serve(3)
    worker = bench.worker()
    deaths = 0
    for _ in deaths_of(publish, url, tmp_path / "home"):
        deaths += 1
        head = bench.registry.head()
        assert head is not None
        # Whatever the head is, workers can take it.
        ack = worker.poll_once()
        assert (ack.state, ack.generation) == (AckState.ACK, head.generation)
    assert deaths >= 10
    # The last run came through: it serves the newest generation.
    ack = worker.poll_once()
    assert ack.state is AckState.ACK
    assert ack.generation == bench.publisher.promoted > 1
    bench.publisher.rollback()
    assert worker.poll_once().state is AckState.ACK
    left = [path.name for path in (tmp_path / "home" / "ledger").rglob(".*")]
    assert len(left) <= 3, left  # of one dead writer per file, swept by the next


def roll_back(bench: Bench) -> None:
    bench.publisher.rollback(to=1)


def test_a_rollback_killed_at_any_step_can_be_run_again(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    first = bench.serve(3)
    bench.serve(5)
    worker = bench.worker()
    deaths = sum(1 for _ in deaths_of(roll_back, url, tmp_path / "home"))
    assert deaths >= 10
    ack = worker.poll_once()
    assert (ack.state, ack.digest) == (AckState.ACK, first.digest)


def next_step(bench: Bench) -> None:
    bench.publisher.roll_out(50)


def test_a_publisher_killed_between_two_steps_of_a_canary_can_be_run_again(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    stable, canary = bench.serve(3), bench.release(5)
    bench.publisher.roll_out(5)
    worker = bench.worker()
    worker.poll_once()
    deaths = 0
    for _ in deaths_of(next_step, url, tmp_path / "home"):
        deaths += 1
        assert worker.poll_once().state is AckState.ACK
        current = worker.current
        assert current.canary is not None
        assert (current.digest, current.canary.digest) == (stable.digest, canary.digest)
        assert current.canary.rollout.percent in (5, 50)
    assert deaths >= 10
    assert worker.poll_once().state is AckState.ACK
    assert worker.current.canary is not None
    assert worker.current.canary.rollout.percent == 50
    assert worker.current.canary.generation == bench.publisher.promoted


def follow(bench: Bench) -> None:
    bench.worker(probation_s=0.0).poll_once()


def test_a_worker_killed_at_any_write_never_goes_back(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    """Also more than DEATHS times: each round serves another release."""
    deaths = rounds = 0
    reached = 0
    client = LoneClient()
    while deaths < DEATHS:
        rounds += 1
        bench.serve(rounds % LAYERS + 1)
        for _ in deaths_of(follow, url, tmp_path / "home"):
            deaths += 1
            worker = bench.worker()
            assert worker.current.generation in (0, rounds - 1, rounds)
            assert worker.current.generation >= reached or worker.report.generation == 0
            reached = max(reached, worker.current.generation)
            client.ask(worker)
            worker.stop()  # this start ended in order, the next one is killed again
        ack = bench.worker().poll_once()
        # A policy whose every start crashed is in quarantine, and any other is served.
        assert ack.state in (AckState.ACK, AckState.TRIPPED), ack
        assert ack.about == rounds
    assert rounds >= DEATHS // 40
    assert len(client.requests) == deaths
    assert torn(client.requests, bench.policy_of) == []


def test_a_worker_killed_at_any_write_of_a_canary_keeps_its_stable_release(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    stable = bench.serve(3)
    bench.worker(probation_s=0.0).poll_once()
    bench.worker(probation_s=0.0).poll_once()  # passes probation
    deaths = 0
    for layer, percent in ((5, 25), (6, 50), (7, 0)):
        bench.publisher.roll_out(percent, bench.release(layer).generation)
        for _ in deaths_of(follow, url, tmp_path / "home"):
            deaths += 1
            worker = bench.worker()
            assert worker.current.digest == stable.digest
            worker.stop()
        worker = bench.worker()
        ack = worker.poll_once()
        assert ack.state in (AckState.ACK, AckState.TRIPPED), ack  # or crashed once too often
        assert worker.current.digest == stable.digest
    assert deaths >= 15
    bench.publisher.rollback()
    for _ in deaths_of(follow, url, tmp_path / "home"):
        worker = bench.worker()
        assert worker.current.digest == stable.digest
        worker.stop()
    assert bench.worker().poll_once().state is AckState.ACK
    assert bench.worker().current.canary is None


def move(bench: Bench) -> None:
    moved_to(bench.worker(), SETTINGS[0])


def test_a_worker_killed_while_it_notes_its_setting_begins_at_a_certified_one(
    bench: Bench, url: str, tmp_path: Path
) -> None:
    bench.publisher.promote(released(bench).generation)
    worker = bench.worker(probation_s=0.0)
    worker.poll_once()
    worker.poll_once()  # passes probation
    found = set()
    for _ in deaths_of(move, url, tmp_path / "home"):
        worker = bench.worker()
        assert worker.current.generation == 1
        found.add(worker.current.setting)
        worker.stop()
    assert found == {SETTINGS[-1], SETTINGS[0]}  # before it was written, and after
    assert bench.worker().current.setting == SETTINGS[0]
