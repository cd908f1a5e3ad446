from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offramp.controller.errors import PolicyRefusedError, Refusal
from offramp.controller.features import CANDIDATES_V1, FloatArray, IntArray
from offramp.controller.keys.envelopes import STAMP_MAGIC, SigningKey
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, Policy, ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest, Rollout
from offramp.controller.release.registry import Head
from offramp.controller.release.trust import Mark, ReleaseVerifier, Stamp

NOW = 1_800_000_100.0


@pytest.fixture
def verifier(key: SigningKey) -> ReleaseVerifier:
    return ReleaseVerifier(trusted_keys(key.public_bytes), "demo", "aa", "bb", lambda: NOW)


@pytest.fixture
def manifest(bundle: PolicyBundle) -> Manifest:
    return replace(bundle.manifest, channel="demo", epoch=1, generation=3)


def head_of(manifest: Manifest, key: SigningKey) -> Head:
    raw = key.sign(manifest.to_bytes())
    return Head(manifest.generation, manifest.epoch, raw, manifest.digest)


def test_a_release_is_verified_then_opened(
    verifier: ReleaseVerifier, manifest: Manifest, bundle: PolicyBundle, key: SigningKey
) -> None:
    assert verifier.verify(head_of(manifest, key), None) == manifest
    assert verifier.verify_stored(key.sign(manifest.to_bytes()), None) == manifest
    assert verifier.open(manifest, bundle.blob).exits == manifest.exits


@pytest.mark.parametrize(
    ("generation", "digest", "reason"),
    [
        (4, "same", Refusal.ROLLBACK),
        (3, "other", Refusal.EQUIVOCATION),
        (3, "same", None),
        (2, "other", None),
    ],
)
def test_the_mark(
    verifier: ReleaseVerifier,
    manifest: Manifest,
    key: SigningKey,
    generation: int,
    digest: str,
    reason: Refusal | None,
) -> None:
    mark = Mark(1, generation, manifest.digest if digest == "same" else "0" * 64)
    if reason is None:
        assert verifier.verify(head_of(manifest, key), mark) == manifest
        return
    with pytest.raises(PolicyRefusedError) as caught:
        verifier.verify(head_of(manifest, key), mark)
    assert caught.value.reason is reason


def test_the_same_number_and_policy_signed_otherwise_is_equivocation(
    verifier: ReleaseVerifier, manifest: Manifest, key: SigningKey
) -> None:
    mark = Mark.of(manifest)
    assert Mark.from_bytes(mark.to_bytes()) == mark
    others = [
        replace(manifest, adapters="a" * 64, certificate=None),
        replace(manifest, guardrails={"min_exits": 0.5}),
    ]
    for other in others:
        with pytest.raises(PolicyRefusedError) as caught:
            verifier.verify(head_of(other, key), mark)
        assert caught.value.reason is Refusal.EQUIVOCATION
        older = Mark.from_bytes(replace(mark, manifest="").to_bytes())  # noted by digest alone
        assert verifier.verify(head_of(other, key), older) == other


@pytest.mark.parametrize(("expires_at", "taken"), [(NOW - 1, False), (NOW, False), (NOW + 1, True)])
def test_expiry(
    verifier: ReleaseVerifier, manifest: Manifest, key: SigningKey, expires_at: float, taken: bool
) -> None:
    head = head_of(replace(manifest, expires_at=expires_at), key)
    if taken:
        verifier.verify(head, None)
        return
    with pytest.raises(PolicyRefusedError) as caught:
        verifier.verify(head, None)
    assert caught.value.reason is Refusal.EXPIRED


def test_no_byte_of_a_whole_release_can_change(
    verifier: ReleaseVerifier, manifest: Manifest, key: SigningKey
) -> None:
    head = head_of(manifest, key)
    before_parsing = {Refusal.BAD_FORMAT, Refusal.FOREIGN_KEY, Refusal.BAD_SIGNATURE}
    for place in range(len(head.envelope)):
        spoilt = bytearray(head.envelope)
        spoilt[place] ^= 1
        with pytest.raises(PolicyRefusedError) as caught:
            verifier.verify(replace(head, envelope=bytes(spoilt)), None)
        assert caught.value.reason in before_parsing
    verifier.verify(head, None)  # control


def stamp(key: SigningKey, **changes: object) -> bytes:
    values: dict[str, object] = {
        "channel": "demo",
        "epoch": 1,
        "generation": 3,
        "issued_at": NOW - 10,
        "expires_at": NOW + 10,
    }
    return key.sign(Stamp(**(values | changes)).to_bytes(), STAMP_MAGIC)  # type: ignore[arg-type]


def at(generation: int) -> Head:
    return Head(generation, 1, b"", "")


def test_a_timestamp_vouches_for_its_head_and_later_ones(
    verifier: ReleaseVerifier, key: SigningKey
) -> None:
    assert verifier.staleness(stamp(key), at(3)) == ""
    assert verifier.staleness(stamp(key), at(4)) == ""


def test_a_timestamp_that_says_nothing(verifier: ReleaseVerifier, key: SigningKey) -> None:
    assert "missing" in verifier.staleness(None, at(3))
    assert "worthless: bad_format" in verifier.staleness(b"junk", at(3))
    assert "worthless: bad_signature" in verifier.staleness(stamp(key) + b" ", at(3))
    assert "worthless: bad_format" in verifier.staleness(key.sign(b"{}", STAMP_MAGIC), at(3))
    assert "channel" in verifier.staleness(stamp(key, channel="other"), at(3))
    assert "expired" in verifier.staleness(stamp(key, expires_at=NOW), at(3))
    assert "epoch 2" in verifier.staleness(stamp(key, epoch=2), at(3))
    assert "promoted 4" in verifier.staleness(stamp(key, generation=4), at(3))


def test_a_release_is_no_timestamp(
    verifier: ReleaseVerifier, manifest: Manifest, key: SigningKey
) -> None:
    assert "bad_format" in verifier.staleness(key.sign(manifest.to_bytes()), at(3))


def test_a_mark_survives_its_bytes() -> None:
    mark = Mark(1, 3, "a" * 64)
    assert Mark.from_bytes(mark.to_bytes()) == mark
    with pytest.raises(PolicyRefusedError, match="digest"):
        Mark.from_bytes(b'{"epoch":1,"generation":3,"digest":"x"}')


def test_promises_that_this_worker_cannot_keep_are_refused(
    verifier: ReleaseVerifier, manifest: Manifest, key: SigningKey
) -> None:
    asked = replace(manifest, rollout=Rollout(percent=5, salt="s"))
    with pytest.raises(PolicyRefusedError) as refused:
        verifier.verify(head_of(asked, key), None)
    assert refused.value.reason is Refusal.UNSUPPORTED


def test_a_policy_that_does_not_fit_the_model_is_refused(key: SigningKey) -> None:
    trusted = trusted_keys(key.public_bytes)
    small = ReleaseVerifier(trusted, "demo", "aa", "bb", lambda: NOW, layers=12, vocab=20)
    table_VK = np.zeros((20, 2), np.int32)
    rows = np.zeros((1, CANDIDATES_V1.width), np.float32)

    def opened(policy: ExitPolicy, canned: FloatArray) -> Policy:
        draft = PolicyBundle.draft(
            pack_policy(policy, canned),
            model="aa",
            tokenizer="bb",
            training={},
            metrics={},
            created_at=NOW,
        )
        return small.open(draft.manifest, draft.blob)

    def reason(policy: ExitPolicy, canned: FloatArray) -> Refusal:
        with pytest.raises(PolicyRefusedError) as refused:
            opened(policy, canned)
        return refused.value.reason

    def threshold(table: IntArray | None) -> ExitPolicy:
        return ThresholdPolicy((3,), CANDIDATES_V1, "margin", 0.5, table)

    blank = np.empty((1, 0), np.float32)
    assert opened(FixedExit(12), blank).exits == (12,)
    assert opened(threshold(table_VK), rows).exits == (3,)
    assert reason(FixedExit(40), blank) is Refusal.WRONG_DEPTH
    assert reason(threshold(None), rows) is Refusal.BAD_SHAPE
    assert reason(threshold(table_VK[:10]), rows) is Refusal.BAD_SHAPE
