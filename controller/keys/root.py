"""The root: whose signatures count for what, and how many of them it takes.

As the root role of The Update Framework (https://theupdateframework.github.io/specification/, §5.3
and §6.1): each version is signed by as many of its own root keys as it asks for, and by as many of
those before it. So who holds an earlier root can follow to the newest, whoever carries it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.keys.envelopes import (
    MAX_SIGNATURES,
    RELEASE_MAGIC,
    ROOT_MAGIC,
    SEVERAL_MAGIC,
    STAMP_MAGIC,
    SignedEnvelope,
    key_id_of,
)
from offramp.controller.keys.key_files import load_public_keys
from offramp.controller.strict import (
    COUNT,
    NUMBER,
    OBJECT,
    Check,
    canonical_json,
    check_fields,
    is_count,
    is_digest,
    or_null,
    parse_strictly,
    refuse,
)


def _are_keys(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_digest, value)) and len({*value}) == len(value)


_ROLE_FIELDS: dict[str, Check] = {
    "keys": (_are_keys, "a list of different public keys, 64 lower-case hex digits each"),
    "threshold": (lambda value: is_count(value) and value > 0, "an integer from 1 on"),
}
_ROLES = ("root", "release", "timestamp")
_FIELDS: dict[str, Check] = {
    "version": COUNT,
    "created_at": NUMBER,
    "expires_at": or_null(NUMBER),
    **dict.fromkeys(_ROLES, OBJECT),
}


@dataclass(frozen=True, slots=True)
class Role:
    """Keys that sign one kind of thing.

    Attributes:
        keys: Raw public keys by key id.
        threshold: How many of them must have signed.

    Raises:
        ConfigError: fewer keys are listed than must sign, or more than an envelope holds.
    """

    keys: Mapping[str, bytes] = field(default_factory=dict)
    threshold: int = 1

    def __post_init__(self) -> None:
        if self.keys and not 1 <= self.threshold <= min(len(self.keys), MAX_SIGNATURES):
            problem = f"{self.threshold} of {len(self.keys)} keys cannot sign"
            remedy = f"List more keys or ask for fewer signatures, {MAX_SIGNATURES} at most"
            raise ConfigError("threshold", problem, remedy)

    @classmethod
    def of(cls, public: Collection[bytes], threshold: int = 1) -> Role:
        """The role of some raw public keys.

        Raises:
            ConfigError: fewer keys are given than must sign.
        """
        return cls({key_id_of(key): key for key in public}, threshold)

    def to_values(self) -> dict[str, Any]:
        """Plain values, as JSON says them."""
        keys = sorted(key.hex() for key in self.keys.values())
        return {"keys": keys, "threshold": self.threshold}

    @classmethod
    def from_values(cls, values: dict[str, Any], name: str) -> Role:
        """Check plain values strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT.
        """
        check_fields(values, _ROLE_FIELDS, f"{name}.")
        if not values["keys"]:
            refuse(f"field '{name}.keys' lists no key")
        try:
            return cls.of([bytes.fromhex(key) for key in values["keys"]], values["threshold"])
        except ConfigError as error:
            refuse(f"{name}.{error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """One version of the root.

    Attributes:
        version: 0 for plain public keys, then one more with each change.
        created_at: When it was drafted, unix seconds.
        expires_at: From when on nothing new is believed under it, unix seconds; None: never.
        root: Who may sign the next version.
        release: Who may sign releases.
        timestamp: Who may sign timestamps; these keys are in use all the time.
    """

    version: int = 0
    created_at: float = 0.0
    expires_at: float | None = None
    root: Role
    release: Role
    timestamp: Role

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def role(self, magic: bytes) -> Role:
        """Who may sign a kind of payload; nobody, if the kind is unknown."""
        roles = {ROOT_MAGIC: self.root, RELEASE_MAGIC: self.release, STAMP_MAGIC: self.timestamp}
        return roles.get(magic, Role())

    def to_bytes(self) -> bytes:
        """Canonical JSON, to be signed with ROOT_MAGIC."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return canonical_json(values | {name: values[name].to_values() for name in _ROLES})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Root:
        """Parse strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT.
        """
        values = parse_strictly(raw, _FIELDS)
        return cls(**values | {name: Role.from_values(values[name], name) for name in _ROLES})

    def follow(self, raw: bytes) -> Root:
        """The next version, signed by enough of this one's root keys and by enough of its own.

        Raises:
            PolicyRefusedError: BAD_FORMAT if it is another version, or as ``open_envelope`` does.
        """
        following = Root.from_bytes(open_envelope(raw, self, ROOT_MAGIC))
        if following.version != self.version + 1:
            refuse(f"root {following.version} does not follow root {self.version}")
        open_envelope(raw, following, ROOT_MAGIC)
        return following


NOBODY = Root(root=Role(), release=Role(), timestamp=Role())
"""Whose signatures count where it is not known whose do."""


def trusted_keys(*public: bytes) -> Root:
    """The root that plain public keys (raw, 32 bytes) make: any one of them signs anything."""
    anyone = Role.of(public)
    return Root(root=anyone, release=anyone, timestamp=anyone)


def load_root(path: Path) -> Root:
    """Read the root that somebody was given: a signed root, or public keys as PEM.

    Raises:
        ConfigError: it is neither, or the root is not signed by enough of its own keys.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        remedy = "Name a root or a PEM file of public keys"
        raise ConfigError("public key", f"{path}: {error}", remedy) from error
    if raw[:4] not in (ROOT_MAGIC, SEVERAL_MAGIC):
        return trusted_keys(*load_public_keys(path))
    try:
        root = Root.from_bytes(SignedEnvelope.from_bytes(raw).payload)
        open_envelope(raw, root, ROOT_MAGIC)
        return root
    except PolicyRefusedError as error:
        problem = f"{path} is no valid root ({error.reason.value}: {error.detail})"
        raise ConfigError("root", problem, "Have it signed: offramp keys sign") from error


def open_envelope(raw: bytes, trusted: Root, magic: bytes = RELEASE_MAGIC) -> bytes:
    """Check an envelope's signatures and return its payload, still unparsed.

    Args:
        raw: The envelope as it travelled.
        trusted: The root that lists the keys whose signatures count.
        magic: The kind of payload expected.

    Raises:
        PolicyRefusedError: TOO_LARGE, BAD_FORMAT, FOREIGN_KEY, BAD_SIGNATURE or BELOW_THRESHOLD.
    """
    envelope = SignedEnvelope.from_bytes(raw)
    if envelope.magic != magic:
        detail = f"the envelope begins with {envelope.magic!r}, not {magic!r}"
        raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
    role = trusted.role(magic)
    known = [key_id for key_id in envelope.signatures if key_id in role.keys]
    good = [key_id for key_id in known if _has_signed(role.keys[key_id], envelope, key_id)]
    if good and len(good) >= role.threshold:
        return envelope.payload
    if not known:
        said = " and ".join(map(repr, envelope.signatures)) or "none"
        raise PolicyRefusedError(Refusal.FOREIGN_KEY, f"key {said} is not trusted")
    if len(good) < len(known):
        forged = next(key_id for key_id in known if key_id not in good)
        raise PolicyRefusedError(Refusal.BAD_SIGNATURE, f"key {forged} did not sign these bytes")
    detail = f"{len(good)} of {role.threshold} signatures that root {trusted.version} asks for"
    raise PolicyRefusedError(Refusal.BELOW_THRESHOLD, detail)


def _has_signed(public: bytes, envelope: SignedEnvelope, key_id: str) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(envelope.signatures[key_id], envelope.signed_by(key_id))
    except (InvalidSignature, ValueError):
        return False
    return True
