"""A worker's policy over restarts, crashes, damaged files and a registry that comes and goes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState, InMemoryRegistry
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker.decoding.request import FULL_DEPTH as FULL_DEPTH_OF_THE_ENGINE
from offramp.worker.following import telling
from offramp.worker.following.refresh import FULL_DEPTH, PolicyRefresher
from support.releases.channel import Bench
from support.releases.waiting import eventually, free_port


@pytest.fixture
def memory() -> InMemoryRegistry:
    return InMemoryRegistry()


@pytest.fixture
def bench(memory: InMemoryRegistry, tmp_path: Path) -> Bench:
    return Bench(memory, tmp_path)


def test_a_first_start_is_full_depth(bench: Bench) -> None:
    worker = bench.worker()
    assert worker.current is FULL_DEPTH is FULL_DEPTH_OF_THE_ENGINE
    assert "no release was accepted before" in worker.report.reason
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.digest) == (AckState.ACK, 0, "")
    assert worker.report is ack


def test_a_release_is_taken_and_acknowledged(bench: Bench) -> None:
    release = bench.serve(3)
    worker = bench.worker()
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.digest) == (AckState.ACK, 1, release.digest)
    assert worker.current.policy == FixedExit(3)
    assert bench.registry.acks() == [ack]
    assert len(ack.boot) == 32


def test_an_unchanged_head_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    before = worker.current
    monkeypatch.setattr(bench.registry, "get_blob", None)  # a fetch would now fail
    assert worker.poll_once().state is AckState.ACK
    assert worker.current is before


def test_a_pinned_snapshot_outlives_the_swap(bench: Bench) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    pinned = worker.current
    bench.serve(5)
    worker.poll_once()
    assert pinned.policy == FixedExit(3)
    assert worker.current.policy == FixedExit(5)


def test_a_restart_goes_on_where_it_was(bench: Bench) -> None:
    bench.serve(3)
    first = bench.worker()
    before = first.poll_once()
    second = bench.worker()
    assert second.current == first.current
    assert second.report.state is AckState.STALE  # until the registry has been asked
    after = second.poll_once()
    assert after.state is AckState.ACK
    assert after.boot != before.boot


def test_a_restart_serves_what_it_knows_while_the_registry_is_down(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(3)
    bench.worker().poll_once()

    def down() -> None:
        raise RegistryUnavailableError("REDIS_URL", "is down", "Start it")

    monkeypatch.setattr(bench.registry, "head", down)
    worker = bench.worker()
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 1)
    assert "is down" in ack.reason
    assert worker.current.policy == FixedExit(3)


@pytest.mark.parametrize("name", ["mark", "trial"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "junk", "folder"])
def test_a_damaged_state_file_means_full_depth(bench: Bench, name: str, damage: str) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    path = bench.state_dir / name
    raw = path.read_bytes()
    flipped = raw[:-30] + bytes([raw[-30] ^ 1]) + raw[-29:]
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        spoilt = {"empty": b"", "cut": raw[:-9], "flipped": flipped, "junk": b"\xff" * 99}
        path.write_bytes(spoilt[damage])
    worker = bench.worker()
    assert worker.current is FULL_DEPTH
    assert worker.report.state is AckState.STALE
    assert worker.report.reason.startswith("cold start at full depth: ")


def test_a_damaged_copy_is_fetched_again(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    (bench.state_dir / "trial").write_bytes(b"junk")
    assert bench.worker().poll_once().generation == 1
    assert bench.worker().current.generation == 1


def restore_old_head(bench: Bench) -> None:
    """Serve generations 1 and 2, let a worker take 2, then put 1 back behind everyone's back."""
    registry = bench.registry
    assert isinstance(registry, InMemoryRegistry)
    bench.serve(3)
    old = registry.head()
    bench.serve(5)
    assert bench.worker().poll_once().generation == 2
    registry._head = old


@pytest.mark.parametrize("loss", [b"junk", None])
def test_a_lost_mark_does_not_open_the_door_to_old_releases(
    bench: Bench, loss: bytes | None
) -> None:
    restore_old_head(bench)
    mark = bench.state_dir / "mark"
    mark.unlink()
    if loss is not None:
        mark.write_bytes(loss)
    worker = bench.worker()
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 0)
    assert "the mark was lost" in ack.reason
    assert "promoted 2, the head is 1" in ack.reason
    # Nor does it without a timestamp at all.
    bench.now += 10**6
    assert worker.poll_once().generation == 0


def test_a_lost_mark_is_found_again_when_the_publisher_vouches_for_the_head(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    (bench.state_dir / "mark").unlink()
    worker = bench.worker()
    bench.now += 10**6
    assert worker.poll_once().state is AckState.STALE
    bench.publisher.heartbeat()
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 1)
    assert bench.worker().current.generation == 1


def test_with_the_mark_the_old_release_is_named_as_such(bench: Bench) -> None:
    # Control for the above: the mark alone suffices to tell.
    restore_old_head(bench)
    ack = bench.worker().poll_once()
    assert (ack.state, ack.generation) == (AckState.NACK, 2)
    assert ack.reason.startswith("rollback: ")


def test_a_state_of_another_key_is_not_trusted(bench: Bench, tmp_path: Path) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    bench.key = load_or_create_key(tmp_path / "other.pem")
    worker = bench.worker()
    assert worker.current is FULL_DEPTH
    assert "foreign_key" in worker.report.reason


def test_a_crash_between_the_two_files_is_survived(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    older_mark = (bench.state_dir / "mark").read_bytes()
    bench.serve(5)
    bench.worker().poll_once()
    (bench.state_dir / "mark").write_bytes(older_mark)
    assert bench.worker().current.generation == 2
    assert (bench.state_dir / "mark").read_bytes() != older_mark


def test_what_cannot_be_recorded_is_not_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(3)
    worker = bench.worker()

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("offramp.worker.following.worker_state.write_durably", full)
        ack = worker.poll_once()
        assert (ack.state, ack.generation) == (AckState.STALE, 0)
        assert "no space left" in ack.reason
        assert worker.current is FULL_DEPTH
    assert worker.poll_once().state is AckState.ACK


def test_an_old_timestamp_is_a_freeze_alarm(bench: Bench) -> None:
    bench.serve(3)
    worker = bench.worker()
    assert worker.poll_once().state is AckState.ACK
    bench.now += 25 * 3600.0
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 1)
    assert "expired" in ack.reason
    assert worker.current.policy == FixedExit(3)
    bench.publisher.heartbeat()
    assert worker.poll_once().state is AckState.ACK


def test_a_release_that_expires_while_it_runs_stays(bench: Bench) -> None:
    bench.serve(3, expires_in_s=60.0)
    worker = bench.worker()
    worker.poll_once()
    bench.now += 61.0
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.NACK, 1)
    assert ack.reason.startswith("expired: ")
    assert worker.current.policy == FixedExit(3)


def test_what_a_worker_runs_is_logged_when_it_changes(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "offramp")
    worker = bench.worker()
    worker.poll_once()
    release = bench.serve(3, expires_in_s=60.0)
    worker.poll_once()
    worker.poll_once()
    bench.now += 61.0
    worker.poll_once()
    worker.poll_once()
    lines = [(each.levelname, vars(each)["fields"]) for each in caplog.records]
    assert [(level, each["generation"], each["state"]) for level, each in lines] == [
        ("INFO", 0, "ACK"),
        ("INFO", 1, "ACK"),
        ("WARNING", 1, "NACK"),
    ]
    assert lines[1][1]["digest"] == release.digest
    assert lines[2][1]["reason"].startswith("expired: ")


def test_a_worker_that_compiles_for_long_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "SOON_S", 0.01)
    bench.serve(3)
    heard: list[Ack] = []

    def compiling(*_: Any) -> None:
        assert eventually(lambda: bool(bench.registry.acks()))
        heard.extend(bench.registry.acks())

    ack = bench.worker(prepare=compiling).poll_once()
    assert (heard[0].state, heard[0].generation) == (AckState.PREPARING, 0)
    assert heard[0].reason.startswith("taking in generation 1")
    assert bench.registry.acks() == [ack]
    assert ack.state is AckState.ACK


def test_a_trip_is_full_depth_until_the_next_release(bench: Bench) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    worker.trip(7, "of a release that does not run")
    assert worker.current.generation == 1
    worker.trip(1, "agreement 0.7 < 0.9")
    worker.trip(1, "latency")
    assert worker.current is FULL_DEPTH
    for _ in range(2):
        ack = worker.poll_once()
        assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 0, 1)
        assert ack.reason == "generation 1: agreement 0.7 < 0.9"
    bench.serve(5)
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.reason) == (AckState.ACK, 2, "")


@pytest.fixture
def following(bench: Bench) -> Iterator[PolicyRefresher]:
    worker = bench.worker(poll_s=60.0)
    worker.start()
    yield worker
    worker.stop()


def test_the_thread_is_woken_by_a_promotion(bench: Bench, following: PolicyRefresher) -> None:
    assert eventually(lambda: following.report.state is AckState.ACK)
    for generation, layer in enumerate((3, 5, 7), start=1):
        bench.serve(layer)
        # Far sooner than the poll of a minute.
        assert eventually(lambda g=generation: following.current.generation == g)  # type: ignore[misc]


def test_the_thread_polls_without_being_woken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(timeout_s: float) -> bool:
        raise RegistryUnavailableError("REDIS_URL", "is down", "Start it")

    monkeypatch.setattr(bench.registry, "wait", broken)
    worker = bench.worker(poll_s=0.02)
    worker.start()
    try:
        bench.serve(3)
        assert eventually(lambda: worker.current.generation == 1)
    finally:
        worker.stop()


def test_the_thread_survives_what_nobody_foresaw(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, failures = bench.registry.head, iter([ZeroDivisionError(), KeyError()])

    def flaky() -> Any:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return head()

    bench.serve(3)
    monkeypatch.setattr(bench.registry, "head", flaky)
    worker = bench.worker(poll_s=0.02)
    worker.start()
    try:
        assert eventually(lambda: worker.current.generation == 1)
    finally:
        worker.stop()


def test_stop_ends_the_thread_and_keeps_the_policy(bench: Bench) -> None:
    bench.serve(3)
    worker = bench.worker(poll_s=60.0)
    worker.start()
    assert eventually(lambda: worker.current.generation == 1)
    worker.stop()
    worker.stop()
    assert not [each for each in threading.enumerate() if each.name == "policy-refresh"]
    assert worker.current.generation == 1


def test_redis_may_be_killed_and_come_back(tmp_path: Path) -> None:
    port = free_port()
    registry = RedisRegistry(f"redis://127.0.0.1:{port}/0", "demo", timeout_s=0.3)
    bench = Bench(registry, tmp_path)
    with EmbeddedRedis(tmp_path / "redis", port) as server:
        bench.serve(3)
        worker = bench.worker(poll_s=0.05)
        worker.start()
        try:
            assert eventually(lambda: worker.report.state is AckState.ACK)
            before = worker.current
            os.kill(server.pid, signal.SIGKILL)
            assert eventually(lambda: worker.report.state is AckState.STALE)
            assert worker.report.generation == 1
            assert "REDIS_URL" in worker.report.reason
            assert worker.current is before
            with EmbeddedRedis(tmp_path / "redis", port):  # empty: nothing was saved
                assert eventually(lambda: "lost its head" in worker.report.reason)
                assert worker.current is before
                bench.publisher.promote(1)
                assert eventually(lambda: worker.report.state is AckState.ACK)
                assert worker.current is before
                bench.serve(5)
                assert eventually(lambda: worker.current.generation == 2)
        finally:
            worker.stop()
            registry.close()
