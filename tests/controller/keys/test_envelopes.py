from __future__ import annotations

import base64
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.keys.envelopes import MAX_ENVELOPE_BYTES, STAMP_MAGIC, SigningKey, key_id_of
from offramp.controller.keys.key_files import load_or_create_key, load_public_keys, save_public_keys
from offramp.controller.keys.root import NOBODY, Root, open_envelope, trusted_keys

PAYLOAD = b'{"channel":"demo","generation":3}'


@pytest.fixture
def trusted(key: SigningKey) -> Root:
    return trusted_keys(key.public_bytes)


def refusal(raw: bytes, trusted: Root) -> Refusal:
    with pytest.raises(PolicyRefusedError) as caught:
        open_envelope(raw, trusted)
    return caught.value.reason


def test_what_was_signed_comes_out(key: SigningKey, trusted: Root) -> None:
    raw = key.sign(PAYLOAD)
    assert open_envelope(raw, trusted) == PAYLOAD
    assert raw[:20] == b"OFR1" + key.key_id.encode()
    assert raw[84:] == PAYLOAD


def test_signing_is_deterministic(key: SigningKey) -> None:
    assert key.sign(PAYLOAD) == key.sign(PAYLOAD)


def test_every_byte_counts(key: SigningKey, trusted: Root) -> None:
    raw = key.sign(PAYLOAD)
    for place in range(len(raw)):
        for bit in (1, 128):
            spoilt = bytearray(raw)
            spoilt[place] ^= bit
            if place < 4:
                expected = Refusal.BAD_FORMAT
            elif place < 20:
                expected = Refusal.FOREIGN_KEY
            else:
                expected = Refusal.BAD_SIGNATURE
            assert refusal(bytes(spoilt), trusted) is expected, place


def test_every_cut_and_any_growth_is_refused(key: SigningKey, trusted: Root) -> None:
    raw = key.sign(PAYLOAD)
    for length in range(len(raw)):
        expected = Refusal.BAD_FORMAT if length < 84 else Refusal.BAD_SIGNATURE
        assert refusal(raw[:length], trusted) is expected, length
    assert refusal(raw + b" ", trusted) is Refusal.BAD_SIGNATURE


def test_kinds_of_envelope_are_not_exchangeable(key: SigningKey, trusted: Root) -> None:
    stamp = key.sign(PAYLOAD, STAMP_MAGIC)
    assert open_envelope(stamp, trusted, STAMP_MAGIC) == PAYLOAD
    assert refusal(stamp, trusted) is Refusal.BAD_FORMAT
    relabelled = b"OFR1" + stamp[4:]
    assert refusal(relabelled, trusted) is Refusal.BAD_SIGNATURE


def test_a_foreign_key_is_refused(key: SigningKey, tmp_path: Path) -> None:
    other = load_or_create_key(tmp_path / "other.pem")
    assert refusal(key.sign(PAYLOAD), trusted_keys(other.public_bytes)) is Refusal.FOREIGN_KEY
    assert refusal(key.sign(PAYLOAD), NOBODY) is Refusal.FOREIGN_KEY
    # Control: a key among several is found.
    both = trusted_keys(other.public_bytes, key.public_bytes)
    assert open_envelope(key.sign(PAYLOAD), both) == PAYLOAD


def test_an_envelope_over_the_limit_is_neither_made_nor_read(
    key: SigningKey, trusted: Root
) -> None:
    with pytest.raises(ConfigError, match="envelope"):
        key.sign(bytes(MAX_ENVELOPE_BYTES))
    assert refusal(bytes(MAX_ENVELOPE_BYTES + 1), trusted) is Refusal.TOO_LARGE


def test_the_private_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "key.pem"
    made = load_or_create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create_key(path).public_bytes == made.public_bytes
    assert made.key_id == key_id_of(made.public_bytes)
    assert len(made.key_id) == 16


def test_a_public_key_survives_its_file(key: SigningKey, tmp_path: Path) -> None:
    other = load_or_create_key(tmp_path / "other.pem")
    save_public_keys(tmp_path / "key.pub", key.public_bytes, other.public_bytes)
    assert load_public_keys(tmp_path / "key.pub") == [key.public_bytes, other.public_bytes]


def test_files_that_hold_no_key_are_config_errors(tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="signing key"):
        load_or_create_key(tmp_path / "junk")
    with pytest.raises(ConfigError, match="public key"):
        load_public_keys(tmp_path / "junk")
    with pytest.raises(ConfigError, match="public key"):
        load_public_keys(tmp_path / "missing")


@pytest.mark.parametrize("mode", [0o666, 0o640, 0o604, 0o620, 0o602])
def test_a_private_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    made = load_or_create_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}.*chmod 600"):
        load_or_create_key(path)
    path.chmod(0o600)
    assert load_or_create_key(path).key_id == made.key_id


def test_all_who_make_the_first_key_at_once_get_the_same(tmp_path: Path) -> None:
    start = threading.Barrier(16)

    def make(_: int) -> str:
        start.wait()
        return load_or_create_key(tmp_path / "key.pem").key_id

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(make, range(16)))) == 1


def test_a_private_key_shows_itself_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "key.pem"
    key = load_or_create_key(path)
    secret = key._private.private_bytes_raw()
    path.chmod(0o666)
    with pytest.raises(ConfigError) as refused:
        load_or_create_key(path)
    said = f"{key!r} {key} {refused.value!r} {refused.value} {caplog.text}"
    for form in (secret.hex(), str(secret), base64.b64encode(secret).decode()):
        assert form not in said
    assert path.read_text().split("\n")[1] not in said
