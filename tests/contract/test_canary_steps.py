"""A canary that is watched: it goes on, holds, or is rolled back, by what workers report."""

from __future__ import annotations

from typing import Any

import pytest

from offramp.controller.release.registry import AckState, Head
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps

Site = Any
STEPS = Steps(percents=(5, 50, 100), min_tokens=100, min_requests=20, min_audited=50)


@pytest.fixture
def stable(site: Site, make_mlp: Any) -> Head:
    head: Head = site.serve(make_mlp(1))
    site.release(make_mlp(2))
    site.publisher.roll_out(5)
    return head


@pytest.fixture
def workers(site: Site, stable: Head) -> list[Any]:
    found = [site.refresher(f"w{number}") for number in range(2)]
    assert {each.poll_once().state for each in found} == {AckState.ACK}
    return found


@pytest.fixture
def overseer(site: Site) -> Overseer:
    return Overseer(site.publisher, site.registry, trips=2, steps=STEPS)


def traffic(worker: Any, wrong_each: int = 61, seconds: float = 0.01) -> None:
    """Tokens on both tracks, as the engine counts them; each worker then says so."""
    current = worker.current
    for snapshot in (current, current.canary):
        for _ in range(60):
            is_canary = snapshot is current.canary
            pace_s = seconds if is_canary else 0.01
            snapshot.watch.note_gap(pace_s, 1, 8)
            snapshot.watch.tally.note_request(pace_s, 1, 8)
    for number in range(1, 61):
        current.canary.watch.judge(number % wrong_each > 0)
    assert worker.poll_once().state is AckState.ACK


def test_it_goes_to_everybody_by_steps(overseer: Overseer, site: Site, workers: list[Any]) -> None:
    story = overseer.look()
    assert story == "canary 3 at 5% holds: 0 tokens of the canary, 100 are asked for"
    assert overseer.look() == ""  # said once
    traffic(workers[0])
    assert overseer.look() == ""  # 60 tokens are too few, and it was said that it holds
    traffic(workers[1])
    story = overseer.look()
    assert story.startswith("canary 3 at 5% passes: full depth disagrees with 0.0% to ")
    assert story.endswith("generation 4 serves 50% of the requests")
    for worker in workers:
        worker.poll_once()
    assert "0 tokens" in overseer.look()  # each step is judged by its own tokens
    for worker in workers:
        traffic(worker)
    assert overseer.look().endswith("generation 5 serves 100% of the requests")
    assert {worker.poll_once().generation for worker in workers} == {5}
    assert overseer.look() == ""


def test_one_that_disagrees_is_rolled_back(
    overseer: Overseer, site: Site, stable: Head, workers: list[Any]
) -> None:
    # Above the bound of the steps, and not long enough for a worker's own guardrail.
    strict = Overseer(
        site.publisher, site.registry, 2, Steps(max_disagreement=0.05, min_tokens=100)
    )
    for worker in workers:
        traffic(worker, wrong_each=4)
    story = strict.look()
    assert story.startswith("canary 3 at 5% fails: full depth disagrees with ")
    assert "generation 4 serves policy" in story
    assert {worker.poll_once().digest for worker in workers} == {stable.digest}
    assert {worker.current.canary for worker in workers} == {None}
    assert strict.look() == ""


def test_a_slow_one_is_rolled_back(overseer: Overseer, workers: list[Any]) -> None:
    for worker in workers:
        traffic(worker, seconds=0.02)
    assert "fails: seconds per token 2.00 times the stable release's" in overseer.look()


def test_a_refused_one_holds_and_says_who_refuses(
    site: Site, stable: Head, overseer: Overseer
) -> None:
    site.store_raw(site.registry.head().digest, b"junk")
    worker = site.refresher("w0")
    assert worker.poll_once().state is AckState.NACK
    story = overseer.look()
    assert "(1 of 1 workers do not run it: w0 says NACK digest_mismatch: " in story
    assert worker.current.digest == stable.digest


def test_trips_end_it_before_any_analysis(
    overseer: Overseer, stable: Head, workers: list[Any]
) -> None:
    for worker in workers:
        for _ in range(200):
            if worker.current.canary is not None:
                worker.current.canary.watch.judge(False)
        worker.poll_once()
    assert overseer.look().startswith("2 of 2 workers tripped (generation 3: full depth disagrees")
    assert {worker.poll_once().digest for worker in workers} == {stable.digest}


def test_a_stable_release_that_trips_is_not_returned_to(
    site: Site, make_mlp: Any, overseer: Overseer
) -> None:
    older = site.serve(make_mlp(0))
    site.serve(make_mlp(1))
    site.release(make_mlp(2))
    site.publisher.roll_out(50)
    worker = site.refresher()
    worker.poll_once()
    stable = worker.current
    for _ in range(200):
        stable.watch.judge(False)
    worker.poll_once()
    assert overseer.look().startswith("1 of 1 workers tripped (generation 2: ")
    assert worker.poll_once().digest == older.digest


def test_without_steps_it_waits_for_a_hand(site: Site, workers: list[Any]) -> None:
    for worker in workers:
        traffic(worker)
    assert Overseer(site.publisher, site.registry, trips=2).look() == ""
    assert site.publisher.promoted == 3
