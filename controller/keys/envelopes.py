"""Wraps what Ed25519 keys sign: an envelope is cut at fixed offsets, and its payload stays unread.

One signature: ``magic (4) | key id (16, ASCII) | signature (64) | payload``. None yet or several:
``OFN1 | magic (4) | count (1) | count × (key id | signature) | payload``, key ids ascending. Either
way a signature covers the magic, its own key id and the payload: so a release can never pass for a
timestamp, and who signs later signs the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.strict import refuse

RELEASE_MAGIC = b"OFR1"
"""First bytes of a signed release."""

STAMP_MAGIC = b"OFS1"
"""First bytes of a signed timestamp."""

ROOT_MAGIC = b"OFT1"
"""First bytes of a signed root."""

SEVERAL_MAGIC = b"OFN1"
"""First bytes of an envelope whose signatures are counted; the payload's own magic follows."""

MAX_ENVELOPE_BYTES = 256 * 1024
"""Larger envelopes are refused unread."""

MAX_SIGNATURES = 16
"""An envelope with more of them is refused before one is checked."""

_MAGIC_BYTES, _KEY_BYTES, _SIGNED_BYTES = 4, 16, 80


def key_id_of(public: bytes) -> str:
    """Name of a public key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(public).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class SignedEnvelope:
    """The parts of an envelope; holding one proves nothing about its signatures.

    Attributes:
        magic: What kind of payload it is.
        signatures: By the id of the key that is said to have signed: Ed25519 over magic, that key
            id and the payload, 64 bytes.
        payload: The signed bytes.
    """

    magic: bytes
    signatures: dict[str, bytes]
    payload: bytes

    def signed_by(self, key_id: str) -> bytes:
        """The bytes that a key's signature covers."""
        # latin-1 maps every byte, so a mangled key id is a foreign key and not a crash.
        return self.magic + key_id.encode("latin-1") + self.payload

    def to_bytes(self) -> bytes:
        """The envelope as it travels.

        Raises:
            ConfigError: it would exceed what workers read.
        """
        pairs = [key.encode("latin-1") + self.signatures[key] for key in sorted(self.signatures)]
        frame = self.magic
        if len(pairs) != 1:
            frame = SEVERAL_MAGIC + self.magic + bytes([len(pairs)])
        raw = frame + b"".join(pairs) + self.payload
        if len(raw) > MAX_ENVELOPE_BYTES or len(pairs) > MAX_SIGNATURES:
            raise ConfigError(
                "envelope",
                f"has {len(raw)} bytes and {len(pairs)} signatures, over {MAX_ENVELOPE_BYTES} or "
                f"{MAX_SIGNATURES}",
                "Shorten the training record, the metrics or the certificate",
            )
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> SignedEnvelope:
        """Cut an envelope at its fixed offsets; the payload stays unread.

        Raises:
            PolicyRefusedError: TOO_LARGE, or BAD_FORMAT if its frame is cut short or ill made.
        """
        if len(raw) > MAX_ENVELOPE_BYTES:
            detail = f"the envelope has {len(raw)} bytes, over {MAX_ENVELOPE_BYTES}"
            raise PolicyRefusedError(Refusal.TOO_LARGE, detail)
        magic, count, start = raw[:_MAGIC_BYTES], 1, _MAGIC_BYTES
        if magic == SEVERAL_MAGIC:
            magic, count, start = raw[4:8], raw[8] if len(raw) > 8 else 0, 9
            if count == 1 or count > MAX_SIGNATURES:
                refuse(f"the envelope counts {count} signatures")
        end = start + count * _SIGNED_BYTES
        if len(raw) < end:
            refuse(f"the envelope has {len(raw)} bytes, fewer than its frame")
        pairs = [raw[at : at + _SIGNED_BYTES] for at in range(start, end, _SIGNED_BYTES)]
        signatures = {pair[:_KEY_BYTES].decode("latin-1"): pair[_KEY_BYTES:] for pair in pairs}
        if len(signatures) < count or list(signatures) != sorted(signatures):
            refuse("the envelope's key ids do not ascend")
        return cls(magic, signatures, raw[end:])


class SigningKey:
    """A private key."""

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
        return self.cosign(SignedEnvelope(magic, {}, payload)).to_bytes()

    def cosign(self, envelope: SignedEnvelope) -> SignedEnvelope:
        """The envelope with this key's signature beside those that it has."""
        signature = self._private.sign(envelope.signed_by(self.key_id))
        return replace(envelope, signatures=envelope.signatures | {self.key_id: signature})
