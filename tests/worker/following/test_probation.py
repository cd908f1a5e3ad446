"""A release proves itself before a worker counts on it, and is put away if it does harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.registry import AckState, InMemoryRegistry
from offramp.worker.decoding.request import FULL_DEPTH
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.following.worker_state import Quarantine, WorkerState
from support.releases.channel import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(InMemoryRegistry(), tmp_path)


def settled(bench: Bench, layer: int) -> PolicyRefresher:
    """A worker whose release has passed its probation."""
    bench.serve(layer)
    worker = bench.worker(probation_s=0.0)
    worker.poll_once()
    worker.poll_once()
    return worker


def files(bench: Bench) -> set[str]:
    return {path.name for path in bench.state_dir.iterdir()}


def test_a_release_is_on_trial_until_its_time_is_over(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    assert files(bench) == {"mark", "trial"}
    worker = settled(bench, 5)
    assert files(bench) == {"mark", "last-known-good"}
    assert bench.worker().current == worker.current


def test_two_crashes_on_probation_put_a_policy_away_under_any_number(bench: Bench) -> None:
    settled(bench, 3)
    bench.serve(5)
    bench.worker().poll_once()
    # Each of these starts ends without a word, as a crash does.
    assert [bench.worker().current.generation for _ in range(2)] == [2, 2]
    worker = bench.worker()
    assert worker.current.policy == FixedExit(3)
    assert worker.current.generation == 1
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 1, 2)
    assert ack.reason == "2 starts under generation 2 ended in a crash"
    bench.serve(5)
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 1, 3)
    bench.serve(7)
    assert worker.poll_once().generation == 4


def test_what_crashed_through_some_adapters_may_run_through_others(bench: Bench) -> None:
    manifest = bench.verifier().read(bench.serve(3).envelope)
    through = replace(manifest, adapters="a" * 64)
    record = Quarantine(generation=0, digest=manifest.digest, adapters="a" * 64, reason="crash")
    assert (record.holds(through), record.holds(manifest)) == (True, False)
    older = replace(record, adapters=None)  # written before adapters were noted
    assert older.holds(through)
    assert older.holds(manifest)
    state = WorkerState(bench.state_dir)
    for each in (record, older):
        state.quarantine(each)
        assert state.quarantined() == each


def test_an_orderly_end_on_probation_is_no_crash(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    for _ in range(5):
        worker = bench.worker()
        assert worker.current.generation == 1
        worker.stop()


def test_without_a_last_known_good_release_a_crashing_one_leaves_full_depth(bench: Bench) -> None:
    bench.serve(3)
    bench.worker().poll_once()
    for _ in range(2):
        bench.worker()
    worker = bench.worker()
    assert worker.current is FULL_DEPTH
    assert worker.poll_once().state is AckState.TRIPPED


def test_what_tripped_stays_away_after_a_restart_and_returns_as_a_new_release(bench: Bench) -> None:
    settled(bench, 3)
    bench.serve(5)
    worker = bench.worker()
    worker.poll_once()
    worker.trip(2, "latency")
    assert worker.current is FULL_DEPTH
    worker.poll_once()
    restarted = bench.worker()
    assert restarted.current.generation == 1
    ack = restarted.poll_once()
    assert (ack.state, ack.about, ack.reason) == (AckState.TRIPPED, 2, "generation 2: latency")
    bench.serve(5)  # the same policy, by a new decision
    assert restarted.poll_once().generation == 3


def test_a_trip_of_a_settled_release_leaves_full_depth_after_a_restart(bench: Bench) -> None:
    worker = settled(bench, 3)
    worker.trip(1, "latency")
    worker.poll_once()
    assert bench.worker().current is FULL_DEPTH


def test_a_trip_while_the_next_release_comes_does_not_end_its_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    bench.serve(5)
    get_blob = bench.registry.get_blob

    def trip_meanwhile(*arguments: Any) -> Any:
        worker.trip(1, "latency")
        return get_blob(*arguments)

    monkeypatch.setattr(bench.registry, "get_blob", trip_meanwhile)
    assert worker.poll_once().generation == 2
    assert worker.poll_once().state is AckState.ACK
    assert bench.worker().current.generation == 2


def test_a_damaged_trial_leaves_the_last_known_good(bench: Bench) -> None:
    settled(bench, 3)
    bench.serve(5)
    bench.worker().poll_once()
    (bench.state_dir / "trial").write_bytes(b"junk")
    worker = bench.worker()
    assert worker.current.generation == 1
    assert worker.poll_once().generation == 2  # fetched again


@pytest.mark.parametrize("name", ["quarantine", "starts"])
def test_damaged_records_of_harm_stop_no_worker(bench: Bench, name: str) -> None:
    bench.serve(3)
    worker = bench.worker()
    worker.poll_once()
    (bench.state_dir / name).write_bytes(b"")
    assert bench.worker().poll_once().state is AckState.ACK


def test_a_policy_slower_than_its_limit_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.serve(3)
    worker = bench.worker()
    with monkeypatch.context() as patch:
        patch.setattr("offramp.worker.following.keeper.SELF_TEST_S", 0.0)
        ack = worker.poll_once()
        assert ack.reason.startswith("too_slow: its canned inputs took ")
    assert worker.current is FULL_DEPTH
