"""Ed25519 keys, and envelopes whose signature is checked before a byte of them is parsed.

An envelope is ``magic (4) | key id (16, ASCII) | signature (64) | payload``. The signature covers
the magic, the key id and the payload, so a release can never pass for a timestamp.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal

RELEASE_MAGIC = b"OFR1"
"""First bytes of a signed release."""

STAMP_MAGIC = b"OFS1"
"""First bytes of a signed timestamp."""

MAX_ENVELOPE_BYTES = 256 * 1024
"""Larger envelopes are refused unread."""

OTHERS = 0o077
"""Permissions that a private key's file must not have: any of its group's or of others'."""

_PEM_END = b"-----END PUBLIC KEY-----\n"

_KEY_ID = slice(4, 20)
_SIGNATURE = slice(20, 84)
_PAYLOAD = slice(84, None)


def key_id_of(public: bytes) -> str:
    """Name of a public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


def trusted_keys(*public: bytes) -> dict[str, bytes]:
    """The mapping that ``open_envelope`` takes, from raw 32-byte public keys."""
    return {key_id_of(key): key for key in public}


@dataclass(frozen=True, slots=True)
class SignedEnvelope:
    """The three parts of an envelope; holding one proves nothing about its signature.

    Attributes:
        magic: What kind of payload it is.
        key_id: Names the key that is said to have signed it.
        signature: Ed25519 over magic, key id and payload, 64 bytes.
        payload: The signed bytes.
    """

    magic: bytes
    key_id: str
    signature: bytes
    payload: bytes

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        return self.magic + self.key_id.encode("latin-1") + self.payload

    def to_bytes(self) -> bytes:
        """The envelope as it travels."""
        return self.magic + self.key_id.encode("latin-1") + self.signature + self.payload

    @classmethod
    def from_bytes(cls, raw: bytes) -> SignedEnvelope:
        """Cut an envelope at its fixed offsets; the payload stays unread.

        Raises:
            PolicyRefusedError: TOO_LARGE, or BAD_FORMAT if it is shorter than its frame.
        """
        if len(raw) > MAX_ENVELOPE_BYTES:
            detail = f"the envelope has {len(raw)} bytes, over {MAX_ENVELOPE_BYTES}"
            raise PolicyRefusedError(Refusal.TOO_LARGE, detail)
        if len(raw) < _SIGNATURE.stop:
            detail = f"the envelope has {len(raw)} bytes, fewer than its frame"
            raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
        # latin-1 maps every byte, so a mangled key id is a foreign key and not a crash.
        return cls(raw[:4], raw[_KEY_ID].decode("latin-1"), raw[_SIGNATURE], raw[_PAYLOAD])


class SigningKey:
    """The publisher's private key."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @property
    def public_bytes(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        """Name of the public key, 16 hex digits."""
        return key_id_of(self.public_bytes)

    def sign(self, payload: bytes, magic: bytes = RELEASE_MAGIC) -> bytes:
        """Wrap a payload in a signed envelope.

        Raises:
            ConfigError: the envelope would exceed what workers read.
        """
        unsigned = SignedEnvelope(magic, self.key_id, b"", payload)
        signature = self._private.sign(unsigned.signed)
        raw = SignedEnvelope(magic, self.key_id, signature, payload).to_bytes()
        if len(raw) > MAX_ENVELOPE_BYTES:
            raise ConfigError(
                "envelope",
                f"has {len(raw)} bytes, over {MAX_ENVELOPE_BYTES}",
                "Shorten the training record, the metrics or the certificate",
            )
        return raw


def load_or_create_key(path: Path) -> SigningKey:
    """Read the private key at a path (PEM), or make one there with mode 0600.

    Raises:
        ConfigError: the file is no Ed25519 private key, lies open to other users, or cannot be
            read or written.
    """
    try:
        if not path.exists():
            _write_private(path)
        private = load_pem_private_key(_read_private(path), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("signing key", f"{path}: {error}", "Give an Ed25519 PEM file") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError("signing key", f"{path} holds another kind of key", "Use Ed25519")
    return SigningKey(private)


def _write_private(path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # write_durably goes through mkstemp, whose files have mode 0600 from the start. Of two that
    # make the first key at once, one wins: the other's would be lost with what it had signed.
    with contextlib.suppress(FileExistsError):
        write_durably(path, pem, replace=False)


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & OTHERS:
            problem = f"{path} has mode {mode:04o}: others may read or replace it"
            remedy = f"Make a new key if they may have, else run chmod 600 {path}"
            raise ConfigError("signing key", problem, remedy)
        return file.read()


def save_public_keys(path: Path, *public: bytes) -> None:
    """Write raw public keys as PEM, one block each.

    Raises:
        OSError: the folder cannot be written.
    """
    keys = [Ed25519PublicKey.from_public_bytes(each) for each in public]
    form = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    write_durably(path, b"".join(key.public_bytes(*form) for key in keys))
    path.chmod(0o644)


def load_public_keys(path: Path) -> list[bytes]:
    """Read every public key of a PEM file as its raw 32 bytes, in order.

    Raises:
        ConfigError: a block is no Ed25519 public key, there is none, or it cannot be read.
    """
    try:
        # Each block ends with the same line; what follows the last one is no key.
        *blocks, rest = path.read_bytes().split(_PEM_END)
        keys = [load_pem_public_key(block + _PEM_END) for block in blocks]
    except (OSError, ValueError) as error:
        raise ConfigError("public key", f"{path}: {error}", "Give an Ed25519 PEM file") from error
    if not keys or rest.strip():
        raise ConfigError("public key", f"{path} is no list of keys", "Give an Ed25519 PEM file")
    raw = [key.public_bytes_raw() for key in keys if isinstance(key, Ed25519PublicKey)]
    if len(raw) < len(keys):
        raise ConfigError("public key", f"{path} holds another kind of key", "Use Ed25519")
    return raw


def open_envelope(raw: bytes, trusted: Mapping[str, bytes], magic: bytes = RELEASE_MAGIC) -> bytes:
    """Check an envelope's signature and return its payload, still unparsed.

    Args:
        raw: The envelope as it travelled.
        trusted: Raw public keys by key id.
        magic: The kind of payload expected.

    Raises:
        PolicyRefusedError: TOO_LARGE, BAD_FORMAT, FOREIGN_KEY or BAD_SIGNATURE.
    """
    envelope = SignedEnvelope.from_bytes(raw)
    if envelope.magic != magic:
        detail = f"the envelope begins with {envelope.magic!r}, not {magic!r}"
        raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
    public = trusted.get(envelope.key_id)
    if public is None:
        raise PolicyRefusedError(Refusal.FOREIGN_KEY, f"key {envelope.key_id!r} is not trusted")
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(envelope.signature, envelope.signed)
    except InvalidSignature as error:
        detail = f"key {envelope.key_id} did not sign these bytes"
        raise PolicyRefusedError(Refusal.BAD_SIGNATURE, detail) from error
    return envelope.payload
