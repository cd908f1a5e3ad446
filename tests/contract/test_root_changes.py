"""Workers follow the root of their channel: keys come, go and are counted without a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.keys.envelopes import ROOT_MAGIC, SignedEnvelope, SigningKey
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import Role, Root, trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import AckState, Head
from offramp.controller.watching.overseer import Overseer
from offramp.worker.following.refresh import PolicyRefresher

FIXED = pack_policy(FixedExit(3), np.zeros((2, 3), np.float32))


class Ceremony:
    """Keys of a channel whose workers began with the plain public key of its publisher."""

    def __init__(self, site: Any) -> None:
        self.site = site
        self.offline = load_or_create_key(site.folder / "offline.pem")
        self.second = load_or_create_key(site.folder / "second.pem")
        self.root: Root = trusted_keys(site.key.public_bytes)
        self.roots: dict[int, bytes] = {}

    def change(self, *signers: SigningKey, **changes: Any) -> None:
        """Sign the next root and put it where workers look."""
        owner = {} if self.root.version else {"root": Role.of([self.offline.public_bytes])}
        self.root = replace(self.root, version=self.root.version + 1, **owner | changes)
        envelope = SignedEnvelope(ROOT_MAGIC, {}, self.root.to_bytes())
        for key in signers or (self.offline, self.site.key):
            envelope = key.cosign(envelope)
        self.roots[self.root.version] = envelope.to_bytes()
        self.site.registry.put_root(self.root.version, envelope.to_bytes())

    def publisher(self, key: SigningKey | None = None) -> Publisher:
        site = self.site
        ledger = FolderLedger(site.folder / "ledger")
        return Publisher(
            site.registry, ledger, key or site.key, site.channel, site.clock,
            trusted=self.root, roots=self.roots,
        )  # fmt: skip

    def release(self, publisher: Publisher, layer: int = 3) -> Head:
        packed = pack_policy(FixedExit(layer), np.zeros((2, 3), np.float32))
        return publisher.release(
            packed, model="aa11", tokenizer="bb22", training={}, metrics={}, uncertified=True
        )

    def cosign(self, head: Head, key: SigningKey) -> None:
        path = FolderLedger(self.site.folder / "ledger").release_path(head.generation)
        path.write_bytes(key.cosign(SignedEnvelope.from_bytes(path.read_bytes())).to_bytes())


@pytest.fixture
def ceremony(site: Any) -> Ceremony:
    return Ceremony(site)


def said(worker: PolicyRefresher) -> tuple[AckState, str]:
    ack = worker.poll_once()
    return ack.state, ack.reason


TELLING = "offramp.worker.following.telling"


def only(*keys: SigningKey, threshold: int = 1) -> Role:
    return Role.of([key.public_bytes for key in keys], threshold)


def test_a_key_is_replaced_and_revoked_while_a_worker_runs(
    site: Any, ceremony: Ceremony, caplog: pytest.LogCaptureFixture
) -> None:
    worker = site.refresher()
    first = ceremony.release(ceremony.publisher())
    ceremony.publisher().promote(first.generation)
    assert said(worker) == (AckState.ACK, "")
    ceremony.change(release=only(ceremony.second), timestamp=only(ceremony.second))
    state, reason = said(worker)
    assert (state, reason.split(":")[0]) == (AckState.NACK, "foreign_key")
    assert worker.current.generation == 1  # what runs goes on
    with pytest.raises(ConfigError, match=r"root 1 lets .* sign no releases"):
        ceremony.release(ceremony.publisher())
    # Its own head is no forgery, though nobody who may sign now stands behind it.
    publisher = ceremony.publisher(ceremony.second)
    publisher.promote(ceremony.release(publisher).generation)
    assert {record.name for record in caplog.records} <= {TELLING}  # the worker's own refusal
    assert said(worker) == (AckState.ACK, "")
    assert worker.current.generation == 2
    # A new worker with the old file, and one that starts without the registry's roots, know it.
    assert said(site.refresher("w1")) == (AckState.ACK, "")
    site.wipe()
    assert site.refresher().current.generation == 2
    publisher.promote(2)  # the head is gone: this brings back its roots as well
    assert said(site.refresher("w2")) == (AckState.ACK, "")
    # What the revoked key signs from now on is nobody's, on the disk as on the wire.
    manifest, blob = site.draft(FixedExit(4), generation=9)
    site.offer(manifest, blob)
    assert said(worker)[1].startswith("foreign_key")
    with pytest.raises(ConfigError, match="no good release"):
        publisher.rollback()


def test_a_release_waits_for_its_second_signature(site: Any, ceremony: Ceremony) -> None:
    ceremony.change(release=only(site.key, ceremony.second, threshold=2))
    worker = site.refresher()
    publisher = ceremony.publisher()
    head = ceremony.release(publisher)
    with pytest.raises(ConfigError, match=r"1 of 2 signatures.*keys sign .*1\.release"):
        publisher.promote(head.generation)
    site.registry.put_blob(FIXED.blob)
    site.registry.promote(head, 0)  # behind the publisher's back
    publisher.heartbeat()
    assert said(worker)[1].startswith("below_threshold: 1 of 2")
    site.registry.discard_head()
    ceremony.cosign(head, ceremony.second)
    publisher.promote(head.generation)
    assert said(worker) == (AckState.ACK, "")
    # Nothing is rolled back by one signature alone, and that is said once.
    worker.trip(1, "it does harm")
    worker.poll_once()
    overseer = Overseer(publisher, site.registry, 1)
    assert "more than one signature" in overseer.look()
    assert overseer.look() == ""
    assert publisher.promoted == 1


def test_what_takes_two_signatures_is_rolled_back_by_a_release_signed_before(
    site: Any, ceremony: Ceremony
) -> None:
    ceremony.change(release=only(site.key, ceremony.second, threshold=2))
    publisher, worker = ceremony.publisher(), site.refresher()
    heads = [ceremony.release(publisher, layer) for layer in (3, 5)]
    for head in heads:
        ceremony.cosign(head, ceremony.second)
        publisher.promote(head.generation)
    ready = publisher.rollback(serve=False)
    assert said(worker) == (AckState.ACK, "")
    worker.trip(2, "it does harm")
    worker.poll_once()
    assert "more than one signature" in Overseer(publisher, site.registry, 1).look()
    ceremony.cosign(ready, ceremony.second)
    story = Overseer(publisher, site.registry, 1).look()
    assert story.endswith(
        f"generation 3, signed before, serves policy {heads[0].digest[:12]} again"
    )
    assert said(worker) == (AckState.ACK, "")
    assert worker.current.policy == FixedExit(3)
    # It was for generation 2 alone.
    worker.trip(3, "it does harm")
    worker.poll_once()
    assert "more than one signature" in Overseer(publisher, site.registry, 1).look()


def test_roots_in_the_registry_are_believed_by_their_signatures_alone(
    site: Any, ceremony: Ceremony
) -> None:
    site.serve(FixedExit(3), uncertified=True)
    worker = site.refresher()
    assert said(worker) == (AckState.ACK, "")
    ceremony.change(ceremony.second, release=only(ceremony.second))
    state, reason = said(worker)
    assert (state, reason.split(":")[0]) == (AckState.STALE, "root 1 in the registry is worthless")
    assert worker.current.generation == 1
    site.registry.put_root(1, b"junk")
    assert "bad_format" in said(worker)[1]
    # The publisher's timestamp tells of roots that somebody withholds.
    ceremony = Ceremony(site)
    ceremony.change(release=only(site.key), timestamp=only(site.key))
    ceremony.publisher().heartbeat()
    site.registry.put_root(1, b"")
    assert said(worker) == (AckState.STALE, "the publisher goes by root 1, this worker by 0")


def test_nothing_new_is_believed_under_a_root_that_expired(site: Any, ceremony: Ceremony) -> None:
    ceremony.change(expires_at=site.now[0] + 60)
    publisher, worker = ceremony.publisher(), site.refresher()
    publisher.promote(ceremony.release(publisher).generation)
    assert said(worker) == (AckState.ACK, "")
    site.now[0] += 61
    assert said(worker)[1].startswith("expired: root 1")
    assert site.refresher().current.generation == 1  # it was accepted in time
    ceremony.change(ceremony.offline, expires_at=site.now[0] + 60)
    assert said(worker) == (AckState.ACK, "")


def test_a_damaged_root_brings_back_no_revoked_key(
    site: Any, ceremony: Ceremony, tmp_path: Path
) -> None:
    site.serve(FixedExit(3), uncertified=True)
    ceremony.change(release=only(ceremony.second))
    assert said(site.refresher())[0] is AckState.NACK
    path = next((tmp_path / "state").rglob("*.root"))
    path.write_bytes(b"junk")
    site.registry.put_root(1, b"")
    worker = site.refresher()
    assert worker.current.generation == 0
    assert said(worker) == (
        AckState.STALE,
        "the roots on this disk are damaged: give it the newest one",
    )
    site.registry.put_root(1, ceremony.roots[1])  # the registry heals it
    assert said(worker)[1].startswith("foreign_key")
