"""Keeps Ed25519 keys in PEM files: private ones closed to others, public ones to hand on."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

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
from offramp.controller.errors import ConfigError
from offramp.controller.keys.envelopes import SigningKey

OTHERS = 0o077
"""Permissions that a private key's file must not have: any of its group's or of others'."""

_PEM_END = b"-----END PUBLIC KEY-----\n"


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
