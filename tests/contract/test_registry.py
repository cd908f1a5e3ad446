"""One contract, two registries."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest

from offramp.controller.errors import PolicyRefusedError, PromoteConflictError, Refusal
from offramp.controller.policies.kinds import digest_of
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState, Head, PolicyRegistry

BLOB = b"weights"
DIGEST = digest_of(BLOB)


def head(generation: int, epoch: int = 1, digest: str = DIGEST) -> Head:
    return Head(generation, epoch, b"envelope \x00\xff %d" % generation, digest)


def ack(worker: str, **changes: Any) -> Ack:
    values: dict[str, Any] = {
        "boot": "b0",
        "generation": 3,
        "digest": DIGEST,
        "about": 3,
        "state": AckState.ACK,
        "reason": "",
        "at": 1_800_000_000.125,
    }
    return Ack(worker=worker, **(values | changes))


def eventually(holds: Any, timeout_s: float = 5.0) -> bool:
    deadline = monotonic() + timeout_s
    while monotonic() < deadline:
        if holds():
            return True
    return bool(holds())


def test_it_keeps_the_protocol(registry: PolicyRegistry) -> None:
    assert isinstance(registry, PolicyRegistry)


def test_an_empty_channel_has_nothing(registry: PolicyRegistry) -> None:
    assert registry.head() is None
    assert registry.fresh() is None
    assert registry.acks() == []
    assert registry.events(10) == []
    assert registry.get_blob(DIGEST, 100) is None


def test_blobs_are_stored_under_their_hash_once(registry: PolicyRegistry) -> None:
    assert registry.put_blob(BLOB) == registry.put_blob(BLOB) == DIGEST
    assert registry.get_blob(DIGEST, len(BLOB)) == BLOB


def test_what_lies_wrongly_under_a_digest_is_overwritten(site: Any) -> None:
    site.store_raw(DIGEST, b"damaged")
    site.registry.put_blob(BLOB)
    assert site.registry.get_blob(DIGEST, 100) == BLOB


def test_blobs_that_are_not_named_are_forgotten(registry: PolicyRegistry) -> None:
    registry.put_blob(b"old")
    registry.put_blob(BLOB)
    registry.forget_blobs({DIGEST})
    assert registry.get_blob(DIGEST, 100) == BLOB
    assert registry.get_blob(digest_of(b"old"), 100) is None


def test_a_discarded_head_makes_room_for_a_first_promotion(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    registry.promote(head(7, epoch=3), 0)
    registry.discard_head()
    assert registry.head() is None
    registry.promote(head(1), 0)
    assert registry.head() == head(1)


def test_a_blob_over_its_limit_is_refused(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    with pytest.raises(PolicyRefusedError) as caught:
        registry.get_blob(DIGEST, len(BLOB) - 1)
    assert caught.value.reason is Refusal.TOO_LARGE


def test_a_promotion_is_read_back_whole(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    registry.promote(head(1), 0)
    assert registry.head() == head(1)
    registry.promote(head(5), 1)
    assert registry.head() == head(5)


@pytest.mark.parametrize(
    ("offered", "expected", "problem"),
    [
        (head(3, epoch=2), 2, "another epoch"),
        (head(3), 1, "the head moved"),
        (head(3), 0, "the head moved"),
        (head(2), 2, "not above"),
        (head(1), 2, "not above"),
        (head(3, digest="0" * 64), 2, "blob is missing"),
    ],
)
def test_a_wrong_promotion_changes_nothing(
    registry: PolicyRegistry, offered: Head, expected: int, problem: str
) -> None:
    registry.put_blob(BLOB)
    registry.promote(head(2), 0)
    with pytest.raises(PromoteConflictError, match=problem) as caught:
        registry.promote(offered, expected)
    assert (caught.value.expected, caught.value.found) == (expected, 2)
    assert registry.head() == head(2)
    assert len(registry.events(10)) == 1


def test_the_first_promotion_expects_no_head(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    with pytest.raises(PromoteConflictError) as caught:
        registry.promote(head(2), 1)
    assert caught.value.found == 0
    assert registry.head() is None


def test_of_fifty_promotions_at_once_one_wins_and_the_others_are_told_which(
    registry: PolicyRegistry,
) -> None:
    registry.put_blob(BLOB)
    registry.promote(head(1), 0)
    generations = range(2, 52)
    start = threading.Barrier(len(generations))

    def race(generation: int) -> int:
        start.wait()
        try:
            registry.promote(head(generation), 1)
        except PromoteConflictError as error:
            return error.found
        return generation

    with ThreadPoolExecutor(len(generations)) as pool:
        told = list(pool.map(race, generations))
    assert len(set(told)) == 1
    assert registry.head() == head(told[0])


def test_without_an_expected_head_the_last_of_many_would_win(registry: PolicyRegistry) -> None:
    # Negative control: promotions that each expect what they find all pass.
    registry.put_blob(BLOB)
    for generation in range(1, 5):
        registry.promote(head(generation), generation - 1)
    assert [event.generation for event in registry.events(10)] == [4, 3, 2, 1]


def test_events_are_the_newest_first(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    for generation in range(1, 5):
        registry.promote(head(generation), generation - 1)
    latest = registry.events(2)
    assert [event.generation for event in latest] == [4, 3]
    assert latest[0].digest == DIGEST
    assert latest[0].at >= latest[1].at > 1_600_000_000


def test_wait_times_out_without_an_event(registry: PolicyRegistry) -> None:
    assert registry.wait(0.02) is False


def test_wait_tells_of_a_promotion_once(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    registry.promote(head(1), 0)
    assert registry.wait(5.0) is True
    assert registry.wait(0.02) is False


def test_wait_is_woken_by_a_promotion(registry: PolicyRegistry) -> None:
    registry.put_blob(BLOB)
    started = monotonic()
    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(registry.wait, 20.0)
        registry.promote(head(1), 0)
        assert woken.result(10.0) is True
    assert monotonic() - started < 10.0


def test_acknowledgements_are_replaced_per_worker(registry: PolicyRegistry) -> None:
    registry.acknowledge(ack("w1"), 60.0)
    registry.acknowledge(ack("w0"), 60.0)
    nack = ack("w1", state=AckState.NACK, reason="rollback: 2 < 3", generation=0, digest="")
    registry.acknowledge(nack, 60.0)
    assert registry.acks() == [ack("w0"), nack]


def test_acknowledgements_of_silent_workers_are_forgotten(registry: PolicyRegistry) -> None:
    registry.acknowledge(ack("quick"), 0.05)
    registry.acknowledge(ack("slow"), 60.0)
    assert eventually(lambda: registry.acks() == [ack("slow")])


def test_the_timestamp_is_forgotten(registry: PolicyRegistry) -> None:
    registry.stamp(b"old", 60.0)
    registry.stamp(b"new", 60.0)
    assert registry.fresh() == b"new"
    registry.stamp(b"short", 0.05)
    assert eventually(lambda: registry.fresh() is None)


def test_channels_do_not_see_each_other(redis_url: str, redis_registry: RedisRegistry) -> None:
    redis_registry.put_blob(BLOB)
    redis_registry.promote(head(1), 0)
    redis_registry.acknowledge(ack("w"), 60.0)
    other = RedisRegistry(redis_url, "another")
    assert other.head() is None
    assert other.acks() == []
    other.close()
