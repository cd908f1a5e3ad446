"""Enough workers that tripped roll a release back by themselves."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.controller.release.registry import AckState
from offramp.controller.watching.overseer import Overseer

Site = Any


@pytest.fixture
def workers(site: Site, make_mlp: Any) -> list[Any]:
    """Four workers that run generation 2."""
    site.serve(make_mlp(1))
    site.serve(make_mlp(2))
    found = [site.refresher(f"w{number}") for number in range(4)]
    assert [each.poll_once().generation for each in found] == [2] * 4
    return found


def trip(worker: Any, generation: int = 2) -> None:
    watch = worker.current.watch
    for _ in range(200):
        watch.judge(False)
    assert worker.poll_once().about == generation


def test_k_of_n_trips_roll_back(site: Site, workers: list[Any], make_mlp: Any) -> None:
    overseer = Overseer(site.publisher, site.registry, trips=2)
    assert overseer.look() == ""
    trip(workers[0])
    assert overseer.look() == ""
    trip(workers[1])
    story = overseer.look()
    assert story.startswith("2 of 4 workers tripped (generation 2: full depth disagrees with 100%")
    assert "generation 3 serves policy" in story
    acks = [each.poll_once() for each in workers]
    assert {(ack.state, ack.generation) for ack in acks} == {(AckState.ACK, 3)}
    assert overseer.look() == ""  # what tripped before is forgiven with its release


def test_a_pool_smaller_than_k_needs_all_of_its_workers(
    site: Site, workers: list[Any], make_mlp: Any
) -> None:
    overseer = Overseer(site.publisher, site.registry, trips=9)
    for worker in workers[:3]:
        trip(worker)
    assert overseer.look() == ""
    trip(workers[3])
    assert "4 of 4 workers tripped" in overseer.look()


def test_without_anything_to_return_to_it_says_so_once(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    worker = site.refresher()
    worker.poll_once()
    trip(worker, generation=1)
    overseer = Overseer(site.publisher, site.registry, trips=1)
    assert "they stay at full depth" in overseer.look()
    assert overseer.look() == ""
    assert site.registry.head().generation == 1


def test_it_keeps_the_timestamp_young(site: Site, workers: list[Any]) -> None:
    overseer = Overseer(site.publisher, site.registry, trips=2)
    site.now[0] += 25 * 3600.0
    assert workers[0].poll_once().state is AckState.STALE
    overseer.look()
    assert workers[0].poll_once().state is AckState.ACK


def test_a_tripped_worker_that_restarts_is_not_served_the_same_again(
    site: Site, workers: list[Any]
) -> None:
    trip(workers[0])
    restarted = site.refresher("w0")
    ack = restarted.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 0, 2)
    assert "full depth disagrees" in ack.reason
