"""A canary serves a share of the requests, and its stable release the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.heads import open_head
from offramp.controller.release.manifest import Manifest, Rollout
from offramp.controller.release.promoting import ChannelHead
from offramp.controller.release.registry import AckState, Head
from offramp.worker.decoding.request import FULL_DEPTH

Site = Any
IDS = [f"cmpl-{number}" for number in range(4000)]


@pytest.fixture
def stable(site: Site, make_mlp: Any) -> Head:
    head: Head = site.serve(make_mlp(1))
    return head


@pytest.fixture
def candidate(site: Site, stable: Head, make_mlp: Any) -> Head:
    """Published beside the stable release, and served to nobody yet."""
    head: Head = site.release(make_mlp(2))
    return head


def generations(worker: Any) -> list[int]:
    """Which generation each of the requests would run under."""
    current = worker.current
    return [current.track(each).generation for each in IDS]


def test_half_of_the_requests_by_hash_on_every_worker_alike(site: Site, candidate: Head) -> None:
    canary = site.publisher.roll_out(50)
    assert (canary.generation, canary.digest) == (3, candidate.digest)
    first, second = site.refresher("w0"), site.refresher("w1")
    assert first.poll_once().state is second.poll_once().state is AckState.ACK
    found = generations(first)
    assert set(found) == {1, 3}
    assert 0.46 < found.count(3) / len(found) < 0.54
    assert generations(second) == found
    assert generations(site.refresher("w0")) == found  # also after a restart


def test_each_step_keeps_the_requests_of_the_last_and_is_a_release(
    site: Site, candidate: Head
) -> None:
    worker = site.refresher()
    before: set[int] = set()
    for generation, percent in enumerate((0, 5, 25, 50), start=3):
        assert site.publisher.roll_out(percent).generation == generation
        assert worker.poll_once().state is AckState.ACK
        assert worker.current.canary.generation == generation  # loaded, also when it serves nobody
        picked = {n for n, found in enumerate(generations(worker)) if found == generation}
        assert abs(len(picked) / len(IDS) - percent / 100) < 0.03
        assert before <= picked
        before = picked
    assert site.publisher.roll_out(100).generation == 7
    assert worker.poll_once().generation == 7
    assert worker.current.canary is None
    assert set(generations(worker)) == {7}
    assert site.refresher().current.canary is None  # nor does it come back


def test_a_request_keeps_what_it_was_pinned_to(site: Site, candidate: Head) -> None:
    worker = site.refresher()
    site.publisher.roll_out(50)
    worker.poll_once()
    pinned = {each: worker.current.track(each) for each in IDS[:50]}
    site.publisher.rollback()
    worker.poll_once()
    assert {snapshot.generation for snapshot in pinned.values()} == {1, 3}
    assert set(generations(worker)) == {4}


def test_a_rollback_ends_a_canary(site: Site, stable: Head, candidate: Head) -> None:
    worker = site.refresher()
    site.publisher.roll_out(5)
    site.publisher.roll_out(25)
    worker.poll_once()
    back = site.publisher.rollback()
    assert back.digest == stable.digest
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, back.generation)
    assert worker.current.canary is None


def test_a_rollback_never_returns_to_a_policy_that_was_only_tried(
    site: Site, stable: Head, candidate: Head, make_mlp: Any
) -> None:
    site.publisher.roll_out(50)
    site.publisher.roll_out(5, site.release(make_mlp(3)).generation)
    assert site.publisher.rollback().digest == stable.digest


def test_a_new_release_begins_the_canary_anew(
    site: Site, stable: Head, candidate: Head, make_mlp: Any
) -> None:
    worker = site.refresher()
    site.publisher.roll_out(50)
    worker.poll_once()
    newer = site.release(make_mlp(3))
    canary = site.publisher.roll_out(5, newer.generation)
    assert worker.poll_once().state is AckState.ACK
    current = worker.current
    assert (current.digest, current.canary.digest) == (stable.digest, newer.digest)
    assert current.canary.generation == canary.generation
    assert current.canary.rollout.percent == 5


def test_a_release_for_everybody_ends_a_canary(site: Site, candidate: Head, make_mlp: Any) -> None:
    worker = site.refresher()
    site.publisher.roll_out(50)
    worker.poll_once()
    newest = site.serve(make_mlp(3))
    assert worker.poll_once().generation == newest.generation
    assert set(generations(worker)) == {newest.generation}


def test_a_worker_that_comes_in_the_midst_takes_both(site: Site, candidate: Head) -> None:
    site.publisher.roll_out(25)
    worker = site.refresher("new")
    assert worker.poll_once().state is AckState.ACK
    assert (worker.current.generation, worker.current.canary.generation) == (1, 3)
    site.wipe()
    restarted = site.refresher("new")
    assert generations(restarted) == generations(worker)
    assert restarted.poll_once().state is AckState.STALE
    assert generations(restarted) == generations(worker)
    site.publisher.promote(3)  # the registry lost both blobs, too
    assert site.refresher("newer").poll_once().state is AckState.ACK


def test_the_first_canary_of_a_channel_begins_beside_full_depth(site: Site, make_mlp: Any) -> None:
    first = site.release(make_mlp(1))
    canary = site.publisher.roll_out(50)
    assert (canary.generation, canary.digest) == (3, first.digest)
    worker = site.refresher()
    assert worker.poll_once().state is AckState.ACK
    assert isinstance(worker.current.policy, NeverExit)
    assert set(generations(worker)) == {2, 3}
    site.publisher.rollback()
    worker.poll_once()
    assert isinstance(worker.current.policy, NeverExit)


def test_without_any_release_there_is_no_canary(site: Site) -> None:
    with pytest.raises(ConfigError, match="generation 0 is not recorded"):
        site.publisher.roll_out(5)
    assert site.registry.head() is None


@pytest.mark.parametrize("percent", [-1, 100.5, float("nan")])
def test_a_percent_is_one(site: Site, candidate: Head, percent: float) -> None:
    with pytest.raises(ConfigError, match="percent"):
        site.publisher.roll_out(percent)


def test_nothing_new_is_no_canary(site: Site, stable: Head) -> None:
    with pytest.raises(ConfigError, match="generation: 1 is of the policy that serves everybody"):
        site.publisher.roll_out(5)


def test_a_step_that_was_signed_for_another_stable_release_is_not_promoted(
    site: Site, candidate: Head, make_mlp: Any
) -> None:
    publisher = site.publisher
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChannelHead, "move", lambda head, generation: None)  # killed before it
        left = publisher.roll_out(5)
    site.serve(make_mlp(3))
    with pytest.raises(ConfigError, match=r"older than|serves no more"):
        site.publisher.promote(left.generation)


def signed(site: Site, canary: Manifest) -> bytes:
    envelope: bytes = site.key.sign(canary.to_bytes())
    return envelope


def of_more_requests(site: Site, head: Head) -> Head:
    """The step as it was signed, but for its percent."""
    envelope = head.envelope.replace(b'"percent":5,', b'"percent":9,')
    assert envelope != head.envelope
    return replace(head, envelope=envelope)


def with_another_digest(site: Site, head: Head) -> Head:
    return replace(head, digest=site.registry.put_blob(b"another blob"))


def beside_itself(site: Site, head: Head) -> Head:
    return replace(head, stable=head.envelope)


def beside_nothing(site: Site, head: Head) -> Head:
    return replace(head, stable=b"")


def beside_an_unsigned_one(site: Site, head: Head) -> Head:
    return replace(head, stable=head.stable[:-1] + b" ")


FORGED = [
    of_more_requests,
    with_another_digest,
    beside_itself,
    beside_nothing,
    beside_an_unsigned_one,
]


@pytest.mark.parametrize("forge", FORGED)
def test_a_forged_step_leaves_both_tracks_and_is_overwritten(
    site: Site, candidate: Head, forge: Any
) -> None:
    worker = site.refresher()
    site.publisher.roll_out(5)
    genuine = site.registry.head()
    worker.poll_once()
    before = worker.current
    site.registry.discard_head()
    site.registry.promote(forge(site, genuine), 0)
    ack = worker.poll_once()
    assert ack.state is AckState.NACK, ack
    assert ack.reason.split(":")[0] in ("bad_signature", "bad_format")
    assert worker.current == before
    site.publisher.promote(3)
    assert site.registry.head() == genuine
    assert worker.poll_once().state is AckState.ACK


def test_an_earlier_step_or_its_stable_release_alone_is_a_rollback(
    site: Site, candidate: Head
) -> None:
    alone = site.registry.head()
    site.publisher.roll_out(5)
    earlier = site.registry.head()
    site.publisher.roll_out(25)
    worker = site.refresher()
    worker.poll_once()
    before = worker.current
    for old in (earlier, alone):
        site.registry.discard_head()
        site.registry.promote(old, 0)
        assert worker.poll_once().reason.startswith("rollback: ")
        assert worker.current == before
        assert site.refresher().poll_once().reason.startswith("rollback: ")  # restarted
        assert site.refresher("new").poll_once().state is not AckState.ACK  # knows its neighbours


def test_a_canary_that_is_refused_leaves_the_stable_release(
    site: Site, stable: Head, make_mlp: Any
) -> None:
    manifest, blob = site.draft(make_mlp(2), generation=2)
    rollout = Rollout(percent=50, stable_generation=1, stable_digest=stable.digest)
    bad = replace(manifest, rollout=rollout, model="dd" * 8)
    site.registry.put_blob(blob)
    head = Head(2, 1, signed(site, bad), bad.digest, site.registry.head().envelope)
    site.registry.promote(head, 1)
    for worker in (site.refresher("known"), site.refresher("new")):
        ack = worker.poll_once()
        assert ack.state is AckState.NACK
        assert ack.reason.startswith("wrong_model")
        assert worker.current.canary is None


def test_a_canary_whose_blob_is_damaged_leaves_a_new_worker_its_stable_release(
    site: Site, candidate: Head
) -> None:
    site.publisher.roll_out(50)
    site.store_raw(candidate.digest, b"junk")
    worker = site.refresher("new")
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.NACK, 1)
    assert worker.current.canary is None
    site.publisher.promote(3)
    assert worker.poll_once().state is AckState.ACK
    assert set(generations(worker)) == {1, 3}


def test_of_two_that_may_crash_a_worker_the_canary_is_put_away_first(
    site: Site, candidate: Head
) -> None:
    site.publisher.roll_out(50)
    site.refresher().poll_once()  # on trial, both of them
    for _ in range(2):
        assert set(generations(site.refresher())) == {1, 3}  # and the process dies
    survivor = site.refresher()
    assert set(generations(survivor)) == {1}
    ack = survivor.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 1, 3)
    assert "ended in a crash" in ack.reason


def trip(snapshot: Any) -> None:
    for _ in range(200):
        snapshot.watch.judge(False)


def test_a_tripped_canary_leaves_the_stable_release(site: Site, candidate: Head) -> None:
    site.publisher.roll_out(50)
    worker = site.refresher()
    worker.poll_once()
    trip(worker.current.canary)
    assert set(generations(worker)) == {1}  # before anybody is told
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 1, 3)
    restarted = site.refresher()
    assert set(generations(restarted)) == {1}
    assert restarted.poll_once().about == 3
    site.publisher.rollback()
    assert restarted.poll_once().state is AckState.ACK


def test_a_tripped_stable_release_takes_its_canary_with_it(site: Site, candidate: Head) -> None:
    site.publisher.roll_out(50)
    worker = site.refresher()
    worker.poll_once()
    trip(worker.current)
    assert worker.current is FULL_DEPTH
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.about) == (AckState.TRIPPED, 0, 1)


def test_what_a_head_says_of_its_canary_is_signed(
    site: Site, stable: Head, candidate: Head
) -> None:
    site.publisher.roll_out(25)
    verifier = site.verifier()
    manifest = verifier.verify(site.registry.head(), None)
    assert manifest.rollout.stable_generation == 1
    assert manifest.rollout.stable_digest == stable.digest
    assert manifest.rollout.percent == 25
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    beside = verifier.verify_stable(site.registry.head(), manifest, None)
    assert (beside.generation, beside.digest) == (1, stable.digest)
    assert open_head(site.registry.head(), verifier.root, "demo") == manifest
