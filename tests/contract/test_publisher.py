"""Releasing, promoting, rolling back: on both registries, seen by a worker."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError, PolicyRefusedError, PromoteConflictError, Refusal
from offramp.controller.keys.envelopes import STAMP_MAGIC
from offramp.controller.keys.root import open_envelope, trusted_keys
from offramp.controller.policies.kinds import digest_of, pack_policy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.ledger import FolderLedger, Ledger
from offramp.controller.release.manifest import Manifest, Rollout
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import AckState, Head
from offramp.controller.release.trust import Stamp
from support.releases.certificates import certificate

Site = Any


def manifest_of(site: Site, generation: int) -> Manifest:
    raw = FolderLedger(site.folder / "ledger").get(generation)
    return Manifest.from_bytes(open_envelope(raw, trusted_keys(site.key.public_bytes)))


def stamp_of(site: Site) -> Stamp:
    trusted = trusted_keys(site.key.public_bytes)
    return Stamp.from_bytes(open_envelope(site.registry.fresh(), trusted, STAMP_MAGIC))


def test_a_release_is_recorded_and_uploaded_but_not_served(site: Site, make_mlp: Any) -> None:
    mine = _certificate(make_mlp(1))
    release = site.release(
        make_mlp(1), certificate=mine, expires_in_s=60.0, rollout=Rollout(percent=100, salt="x")
    )
    assert release.generation == 1
    assert site.registry.head() is None
    assert site.registry.get_blob(release.digest, 10**6) is not None
    manifest = manifest_of(site, 1)
    assert (manifest.channel, manifest.epoch, manifest.digest) == ("demo", 1, release.digest)
    assert manifest.certificate == mine
    assert manifest.metrics == {"speedup": 1.5}
    assert manifest.expires_at == site.clock() + 60.0
    assert manifest.rollout == Rollout(percent=100, salt="x")
    assert manifest.guardrails == {}
    assert manifest.rollback_of is None


def test_a_promotion_serves_it_with_a_timestamp(site: Site, make_mlp: Any) -> None:
    release = site.release(make_mlp(1))
    site.publisher.promote(1)
    head = site.registry.head()
    assert (head.generation, head.epoch, head.digest) == (1, 1, release.digest)
    assert head.envelope == release.envelope
    stamp = stamp_of(site)
    assert (stamp.channel, stamp.generation, stamp.issued_at) == ("demo", 1, site.clock())


class ListLedger:
    """A ledger in memory, of nothing that ``FolderLedger`` has."""

    def __init__(self) -> None:
        self.releases: list[bytes] = []
        self.blobs: dict[str, bytes] = {}
        self.served: list[int] = []
        self.turn = RLock()

    def append(
        self, generation: int, envelope: bytes, blob: bytes, others: Iterable[bytes] = ()
    ) -> None:
        if generation != len(self.releases) + 1:
            raise ConfigError("ledger", f"generation {generation} is not next")
        self.blobs |= {digest_of(each): each for each in (blob, *others)}
        self.releases.append(envelope)

    def generations(self) -> list[int]:
        return [*range(1, len(self.releases) + 1)]

    def last(self) -> int:
        return len(self.releases)

    def get(self, generation: int) -> bytes:
        return self.releases[generation - 1]

    def blob(self, digest: str) -> bytes:
        return self.blobs[digest]

    def promotions(self) -> list[int]:
        return self.served

    def promoted(self) -> int:
        return (self.served or [0])[-1]

    def record_promotion(self, generation: int) -> None:
        self.served.append(generation)

    def writing(self) -> AbstractContextManager[Any]:
        return self.turn

    def release_path(self, generation: int) -> Path:
        return Path(f"{generation}.release")


def test_a_publisher_takes_any_ledger(site: Site, make_mlp: Any) -> None:
    ledger: Ledger = ListLedger()
    publisher = Publisher(site.registry, ledger, site.key, site.channel, site.clock)
    for seed in (1, 2):
        policy = make_mlp(seed)
        packed = pack_policy(policy, np.zeros((2, policy.schema.width), np.float32))
        about: dict[str, Any] = {"model": "aa11", "tokenizer": "bb22", "uncertified": True}
        release = publisher.release(packed, training={}, metrics={}, **about)
        publisher.promote(release.generation)
    back = publisher.rollback(1)
    assert site.registry.head() == back
    assert ledger.promotions() == [1, 2, 3]
    assert ledger.get(3) == back.envelope
    assert site.registry.get_blob(back.digest, 10**6) == ledger.blob(back.digest)


def test_generations_count_on_past_releases_never_served(site: Site, make_mlp: Any) -> None:
    assert [site.release(make_mlp(seed)).generation for seed in range(3)] == [1, 2, 3]
    site.publisher.promote(3)
    assert site.release(make_mlp(3)).generation == 4


def test_a_heartbeat_renews_the_timestamp(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    before = stamp_of(site)
    site.now[0] += 100.0
    site.publisher.heartbeat()
    assert stamp_of(site).expires_at == before.expires_at + 100.0


def test_a_rollback_is_a_higher_generation_of_the_old_policy(site: Site, make_mlp: Any) -> None:
    worker = site.refresher()
    old = site.serve(make_mlp(1), rollout=Rollout(percent=100, salt="s"), expires_in_s=10.0)
    new = site.serve(make_mlp(2))
    assert worker.poll_once().digest == new.digest
    site.now[0] += 1000.0  # the old release itself has expired; its policy is signed anew
    back = site.publisher.rollback()
    assert (back.generation, back.digest) == (3, old.digest)
    manifest = manifest_of(site, 3)
    assert manifest.rollback_of == 2
    assert manifest.rollout == Rollout(percent=100, salt="s")
    assert manifest.expires_at == site.clock() + 10.0
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.digest) == (AckState.ACK, 3, old.digest)


def test_rollbacks_go_further_back_and_never_to_what_failed(site: Site, make_mlp: Any) -> None:
    digests = [site.serve(make_mlp(seed)).digest for seed in (1, 2, 3)]
    site.release(make_mlp(4))  # never served, so nothing to go back to
    assert site.publisher.rollback().digest == digests[1]
    assert site.publisher.rollback().digest == digests[0]
    with pytest.raises(ConfigError, match="no good release"):
        site.publisher.rollback()
    assert site.publisher.rollback(to=3).digest == digests[2]  # unless told so


def test_a_rollback_needs_something_older(site: Site, make_mlp: Any) -> None:
    with pytest.raises(ConfigError, match="nothing was promoted"):
        site.publisher.rollback()
    site.serve(make_mlp(1))
    with pytest.raises(ConfigError, match="not older"):
        site.publisher.rollback(to=1)
    with pytest.raises(ConfigError, match="not recorded"):
        site.publisher.rollback(to=7)


def test_an_older_release_cannot_be_promoted(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    site.serve(make_mlp(2))
    with pytest.raises(ConfigError, match="Roll back instead"):
        site.publisher.promote(1)
    with pytest.raises(ConfigError, match="not recorded"):
        site.publisher.promote(9)
    assert site.registry.head().generation == 2


def test_promoting_what_is_served_renews_its_timestamp(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    issued_at = stamp_of(site).issued_at
    site.now[0] += 60
    site.publisher.promote(1)
    assert stamp_of(site).issued_at == issued_at + 60
    assert site.registry.head().generation == 1


def test_a_promotion_whose_answer_was_lost_can_be_repeated_and_rolled_back(
    site: Site, make_mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.serve(make_mlp(1))
    second = site.release(make_mlp(2))
    for attempt in ("promote", "rollback"):
        with monkeypatch.context() as patch:
            # The process ends between the registry's change and the ledger's record of it.
            patch.setattr(FolderLedger, "record_promotion", _lose)
            with pytest.raises(OSError, match="lost"):
                site.publisher.promote(second.generation)
        assert site.registry.head().generation == second.generation
        if attempt == "promote":
            site.publisher.promote(second.generation)
            second = site.release(make_mlp(3))
    assert site.publisher.rollback().generation == second.generation + 1


def _lose(*_: Any) -> None:
    raise OSError("lost")


def test_a_flushed_registry_is_filled_again_from_the_ledger(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    worker = site.refresher()
    worker.poll_once()
    site.wipe()
    lost = worker.poll_once()
    assert (lost.state, lost.generation) == (AckState.STALE, 1)
    assert "lost its head" in lost.reason
    site.publisher.promote(1)
    assert worker.poll_once().state is AckState.ACK
    assert site.refresher("new").poll_once().generation == 1


def test_a_registry_restored_from_an_old_dump_is_noticed(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    old = site.registry.head()
    blob = site.registry.get_blob(old.digest, 10**6)
    site.serve(make_mlp(2))
    site.wipe()
    site.registry.put_blob(blob)
    site.registry.promote(old, 0)
    site.publisher.heartbeat()  # signs what the ledger knows, not what the registry holds
    ack = site.refresher("new").poll_once()
    assert ack.state is AckState.STALE
    assert "promoted 2, the head is 1" in ack.reason


def test_concurrent_publishers_move_the_head_once_each(site: Site, make_mlp: Any) -> None:
    for seed in range(4):
        site.release(make_mlp(seed))

    def promote(generation: int) -> bool:
        try:
            site.publisher.promote(generation)
        except (PromoteConflictError, ConfigError):
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(promote, range(1, 5)))
    promoted = [generation for generation, moved in enumerate(won, start=1) if moved]
    assert promoted
    served = [event.generation for event in site.registry.events(10)]
    assert served == sorted(promoted, reverse=True)
    assert site.registry.head().generation == promoted[-1]


def test_a_publisher_of_another_epoch_is_fenced_off(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    ledger = FolderLedger(site.folder / "ledger")
    late = Publisher(site.registry, ledger, site.key, "demo", site.clock, epoch=2)
    release = late.release(
        pack_policy(make_mlp(2), _canned()),
        model="aa11",
        tokenizer="bb22",
        training={},
        metrics={},
        uncertified=True,
    )
    with pytest.raises(PromoteConflictError, match="another epoch"):
        late.promote(release.generation)


def test_what_no_worker_would_take_is_not_signed(site: Site, make_mlp: Any) -> None:
    with pytest.raises(PolicyRefusedError) as caught:
        site.release(make_mlp(1), model="NOT HEX")
    assert caught.value.reason is Refusal.BAD_FORMAT
    with pytest.raises(ConfigError, match="manifest"):
        site.release(make_mlp(1), metrics={"speedup": float("nan")})
    with pytest.raises(ConfigError, match="envelope"):
        site.release(make_mlp(1), training={"log": "x" * 300_000})
    assert FolderLedger(site.folder / "ledger").last() == 0


def test_a_ledger_behind_the_registry_is_refused(site: Site, make_mlp: Any) -> None:
    site.release(make_mlp(1))
    site.offer(*site.draft(make_mlp(5), generation=5))
    with pytest.raises(ConfigError, match="gap"):
        site.release(make_mlp(2))


def test_a_lost_ledger_goes_on_above_the_head(site: Site, make_mlp: Any) -> None:
    site.offer(*site.draft(make_mlp(5), generation=5))
    assert site.serve(make_mlp(2)).generation == 6


def test_an_uncertified_policy_is_released_only_by_saying_so(site: Site, make_mlp: Any) -> None:
    with pytest.raises(ConfigError, match=r"certificate: the policy has none.*--uncertified"):
        site.release(make_mlp(1), uncertified=False)
    assert FolderLedger(site.folder / "ledger").last() == 0
    site.serve(make_mlp(1), uncertified=True)
    assert manifest_of(site, 1).metrics == {"speedup": 1.5, "uncertified": True}
    assert manifest_of(site, 1).guarantee == "uncertified"
    site.serve(make_mlp(2))
    rollback = site.publisher.rollback()
    assert manifest_of(site, rollback.generation).metrics["uncertified"] is True


def test_what_needs_no_saying_so_is_not_called_uncertified(site: Site, make_mlp: Any) -> None:
    site.release(NeverExit())  # full depth needs no certificate
    assert manifest_of(site, 1).guarantee == "full depth"
    with pytest.raises(ConfigError, match="uncertified: was said of a policy that is full depth"):
        site.release(NeverExit(), uncertified=True)
    mine = _certificate(make_mlp(1))
    with pytest.raises(ConfigError, match="uncertified: was said of a policy that is certified"):
        site.release(make_mlp(1), certificate=mine, uncertified=True)
    site.release(make_mlp(1), certificate=mine)
    assert manifest_of(site, 2).guarantee == "certified"


def test_a_certificate_of_another_policy_is_not_signed(site: Site, make_mlp: Any) -> None:
    with pytest.raises(PolicyRefusedError, match="the certificate is of policy"):
        site.release(make_mlp(2), certificate=_certificate(make_mlp(1)))
    assert FolderLedger(site.folder / "ledger").last() == 0


def _certificate(policy: Any) -> Certificate:
    digest = pack_policy(policy, _canned(16)).digest
    return certificate(digest, model="aa11", tokenizer="bb22")


def _canned(rows: int = 8) -> Any:
    return np.random.default_rng(0).normal(size=(rows, 11)).astype(np.float32)


def test_a_worker_woken_by_the_first_promotion_finds_a_timestamp(
    site: Site, make_mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, promote = site.refresher(), site.registry.promote
    seen: list[AckState] = []

    def promote_and_look(*arguments: Any) -> None:
        promote(*arguments)
        seen.append(worker.poll_once().state)

    monkeypatch.setattr(site.registry, "promote", promote_and_look)
    site.serve(make_mlp(1))
    assert seen == [AckState.ACK]


ASKED: dict[str, dict[str, Any]] = {
    "everybody": {},
    "everybody, salted": {"rollout": Rollout(percent=100, salt="x")},
    "half of the requests": {"rollout": Rollout(percent=50, salt="x")},
    "nobody": {"rollout": Rollout(percent=0, salt="x")},
    "guarded": {"guardrails": {"max_disagreement": 0.1, "max_token_ms": 50}},
    "unknown guardrails": {"guardrails": {"max_exit_rate": 0.9}},
    "a guardrail out of range": {"guardrails": {"max_disagreement": 1.5}},
    "for a minute": {"expires_in_s": 60.0},
    "expired at once": {"expires_in_s": 0.0},
    "expired before": {"expires_in_s": -5.0},
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_workers_refuse_is_not_signed(site: Site, make_mlp: Any, asked: str) -> None:
    """Asked of the worker's own verifier, with a signature that the publisher did not give."""
    options = dict(ASKED[asked])
    lifetime_s = options.get("expires_in_s")
    manifest, _ = site.draft(make_mlp(1), generation=1)
    by_hand = replace(
        manifest,
        rollout=options.get("rollout", Rollout()),
        guardrails=options.get("guardrails", {}),
        expires_at=None if lifetime_s is None else site.clock() + lifetime_s,
    )
    head = Head(1, 1, site.key.sign(by_hand.to_bytes()), by_hand.digest)
    try:
        site.verifier().verify(head, None)
        refused = None
    except PolicyRefusedError as error:
        refused = error.reason
    is_plain = asked in ("everybody", "everybody, salted", "guarded", "for a minute")
    assert (refused is None) == is_plain
    if refused is None:
        assert site.release(make_mlp(1), **options).generation == 1
        return
    with pytest.raises(PolicyRefusedError) as told:
        site.release(make_mlp(1), **options)
    assert told.value.reason is refused
    assert FolderLedger(site.folder / "ledger").last() == 0
    assert site.registry.get_blob(by_hand.digest, 10**6) is None


def test_a_release_that_expired_meanwhile_is_not_promoted(site: Site, make_mlp: Any) -> None:
    release = site.release(make_mlp(1), expires_in_s=10.0)
    site.now[0] += 11.0
    with pytest.raises(PolicyRefusedError, match="expired"):
        site.publisher.promote(release.generation)
    assert site.registry.head() is None
