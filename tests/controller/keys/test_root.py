from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.keys.envelopes import (
    MAX_SIGNATURES,
    RELEASE_MAGIC,
    ROOT_MAGIC,
    STAMP_MAGIC,
    SignedEnvelope,
    SigningKey,
)
from offramp.controller.keys.key_files import load_or_create_key, save_public_keys
from offramp.controller.keys.root import Role, Root, load_root, open_envelope, trusted_keys
from offramp.controller.keys.root_chain import RootChain

PAYLOAD = b"{}"


@pytest.fixture
def keys(tmp_path: Path) -> list[SigningKey]:
    return [load_or_create_key(tmp_path / f"{name}.pem") for name in range(5)]


def role(*keys: SigningKey, threshold: int = 1) -> Role:
    return Role.of([key.public_bytes for key in keys], threshold)


def signed(root: Root, *keys: SigningKey) -> bytes:
    return cosigned(root.to_bytes(), *keys, magic=ROOT_MAGIC)


def cosigned(payload: bytes, *keys: SigningKey, magic: bytes = RELEASE_MAGIC) -> bytes:
    envelope = SignedEnvelope(magic, {}, payload)
    for key in keys:
        envelope = key.cosign(envelope)
    return envelope.to_bytes()


def refused(reason: Refusal, raw: bytes, root: Root, magic: bytes = RELEASE_MAGIC) -> str:
    with pytest.raises(PolicyRefusedError) as caught:
        open_envelope(raw, root, magic)
    assert caught.value.reason is reason
    return caught.value.detail


def test_a_threshold_counts_different_trusted_keys(keys: list[SigningKey]) -> None:
    a, b, c, *_ = keys
    root = Root(root=role(a), release=role(a, b, c, threshold=2), timestamp=role(c))
    for pair in ((a, b), (c, a), (a, b, c)):
        assert open_envelope(cosigned(PAYLOAD, *pair), root) == PAYLOAD
    assert "1 of 2" in refused(Refusal.BELOW_THRESHOLD, a.sign(PAYLOAD), root)
    assert "1 of 2" in refused(Refusal.BELOW_THRESHOLD, cosigned(PAYLOAD, a, a), root)
    assert "1 of 2" in refused(Refusal.BELOW_THRESHOLD, cosigned(PAYLOAD, a, keys[4]), root)
    refused(Refusal.FOREIGN_KEY, cosigned(PAYLOAD, *keys[3:]), root)
    refused(Refusal.FOREIGN_KEY, cosigned(PAYLOAD), root)
    # One forged signature beside a good one is no second one.
    good = a.cosign(SignedEnvelope(RELEASE_MAGIC, {}, PAYLOAD))
    forged = replace(good, signatures=good.signatures | {b.key_id: bytes(64)})
    assert b.key_id in refused(Refusal.BAD_SIGNATURE, forged.to_bytes(), root)


def test_each_kind_of_payload_has_its_own_keys(keys: list[SigningKey]) -> None:
    a, b, c, *_ = keys
    root = Root(root=role(a), release=role(b), timestamp=role(c))
    assert open_envelope(c.sign(PAYLOAD, STAMP_MAGIC), root, STAMP_MAGIC) == PAYLOAD
    refused(Refusal.FOREIGN_KEY, c.sign(PAYLOAD), root)
    refused(Refusal.FOREIGN_KEY, b.sign(PAYLOAD, STAMP_MAGIC), root, STAMP_MAGIC)
    refused(Refusal.FOREIGN_KEY, b.sign(PAYLOAD, ROOT_MAGIC), root, ROOT_MAGIC)


def test_an_ill_made_frame_is_refused(keys: list[SigningKey]) -> None:
    a, b, *_ = keys
    root = trusted_keys(a.public_bytes, b.public_bytes)
    raw = cosigned(PAYLOAD, a, b)
    for length in range(9 + 2 * 80):
        with pytest.raises(PolicyRefusedError):
            open_envelope(raw[:length], root)
    one, other = raw[9:89], raw[89:169]
    for pairs in ((other, one), (one, one), (one,), (one,) * (MAX_SIGNATURES + 1)):
        frame = raw[:8] + bytes([len(pairs)]) + b"".join(pairs)
        refused(Refusal.BAD_FORMAT, frame + PAYLOAD, root)


def test_a_root_follows_when_old_and_new_keys_sign(keys: list[SigningKey]) -> None:
    a, b, c, d, _ = keys
    first = Root(version=1, root=role(a, b, threshold=2), release=role(d), timestamp=role(d))
    second = replace(first, version=2, root=role(c))
    assert first.follow(signed(second, a, b, c)) == second
    for too_few in ((a, b), (a, c), (c,), ()):
        with pytest.raises(PolicyRefusedError):
            first.follow(signed(second, *too_few))
    for version in (1, 3):
        with pytest.raises(PolicyRefusedError, match="does not follow"):
            first.follow(signed(replace(second, version=version), a, b, c))
    # What any key of plain PEM may do, it may hand over, too.
    assert trusted_keys(d.public_bytes).follow(signed(first, a, b, d)) == first


def test_what_a_root_says_survives_its_bytes(keys: list[SigningKey], tmp_path: Path) -> None:
    a, b, *_ = keys
    root = Root(version=3, expires_at=7.5, root=role(a), release=role(b, a), timestamp=role(b))
    assert Root.from_bytes(root.to_bytes()) == root
    (tmp_path / "root").write_bytes(signed(root, a))
    assert load_root(tmp_path / "root") == root
    save_public_keys(tmp_path / "pem", a.public_bytes, b.public_bytes)
    assert load_root(tmp_path / "pem") == trusted_keys(a.public_bytes, b.public_bytes)
    (tmp_path / "unsigned").write_bytes(signed(root))
    with pytest.raises(ConfigError, match="offramp keys sign"):
        load_root(tmp_path / "unsigned")


@pytest.mark.parametrize(
    "spoil",
    [
        (b'"threshold":1', b'"threshold":0'),
        (b'"threshold":1', b'"threshold":2'),
        (b'"threshold":1', b'"threshold":true'),
        (b'"version":3', b'"version":-1'),
        (b'"version":3', b'"version":3,"more":1'),
        (b'"keys":["', b'"keys":["00'),
        (b'"keys":["', b'"keys":[],"key":["'),
    ],
)
def test_a_root_that_makes_no_sense_is_refused(
    keys: list[SigningKey], spoil: tuple[bytes, bytes]
) -> None:
    root = Root(version=3, root=role(keys[0]), release=role(keys[0]), timestamp=role(keys[0]))
    with pytest.raises(PolicyRefusedError) as caught:
        Root.from_bytes(root.to_bytes().replace(*spoil, 1))
    assert caught.value.reason is Refusal.BAD_FORMAT


def test_more_signatures_than_keys_cannot_be_asked_for(keys: list[SigningKey]) -> None:
    with pytest.raises(ConfigError, match="3 of 2 keys"):
        role(*keys[:2], threshold=3)


def test_a_chain_goes_on_from_disk_and_never_back(keys: list[SigningKey], tmp_path: Path) -> None:
    a, b, *_ = keys
    given = trusted_keys(a.public_bytes)
    roots = [Root(version=n, root=role(a), release=role(b), timestamp=role(b)) for n in (1, 2, 3)]
    mine, theirs = (RootChain(given, tmp_path / name) for name in ("mine", "theirs"))
    for root in roots:
        mine.add(signed(root, a))
        theirs.add(signed(root, a))
    assert RootChain(given, tmp_path / "mine").newest == roots[2]
    assert [version for version, _ in mine.envelopes()] == [1, 2, 3]
    # A damaged file is taken from a neighbour, and without one the chain says that it is not whole.
    path = next((tmp_path / "mine").rglob("00000002.root"))
    path.write_bytes(path.read_bytes()[:-1])
    lost = RootChain(given, tmp_path / "mine")
    assert (lost.newest, lost.is_whole) == (roots[0], False)
    healed = RootChain(given, tmp_path / "mine", [tmp_path / "theirs"])
    assert (healed.newest, healed.is_whole) == (roots[2], True)
    # Another given root begins anew.
    assert RootChain(roots[0], tmp_path / "mine").newest == roots[0]
