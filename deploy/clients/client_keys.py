"""The keys that clients of the pool present: by name, and at rest as hashes only.

``clients.json`` holds a hash by name, or, of a client with bounds, an object with the hash as
``key`` beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.controller.durable import lock_file, write_durably
from offramp.controller.errors import ConfigError
from offramp.deploy.clients.allowances import UNBOUND, Allowance

CLIENTS = "clients.json"
"""File in OFFRAMP_HOME."""

SHARED = "OFFRAMP_API_KEY"
"""Name of the client who presents the key of that variable."""

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Client:
    """What is kept of a client.

    Attributes:
        key: SHA-256 of its key, hex.
        allowance: What it may ask.
    """

    key: str
    allowance: Allowance = UNBOUND


class ClientKeys:
    """Tells clients by their keys.

    The file is read again whenever it has changed: who is removed from it is refused at once.

    Args:
        path: Names and hashes, as ``add_client`` writes them; None, or no file there: none.
        shared: One more key, which is kept as a hash, too.

    Attributes:
        are_asked_for: Whether there was a key at the beginning; if so, one is asked for ever after.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None, shared: str | None = None) -> None:
        self._path = path
        self._shared = {} if shared is None else {SHARED: Client(_hash(shared))}
        self._version = _version(path)
        self._clients = {} if path is None else read_clients(path)
        self.are_asked_for = bool(self._clients or self._shared)

    def client(self, key: str) -> str | None:
        """The name of the client who presents a key; None if nobody has it."""
        presented, found = _hash(key), None
        # All of them, and each in constant time: how long it takes tells nothing.
        for name, known in self._known().items():
            if hmac.compare_digest(presented, known.key):
                found = name
        return found

    def allowance(self, name: str) -> Allowance:
        """What a client may ask."""
        found = self._clients.get(name)
        return UNBOUND if found is None else found.allowance

    def _known(self) -> dict[str, Client]:
        version = _version(self._path)
        if self._path is not None and version != self._version:
            self._version = version
            try:
                self._clients = read_clients(self._path)
            except ConfigError:
                _logger.exception("clients cannot be read; those that were known stay")
        return self._clients | self._shared


def _version(path: Path | None) -> tuple[int, int]:
    """Differs between two contents of a file, which are written to two files."""
    try:
        about = path and path.stat()
    except FileNotFoundError:
        about = None
    return (about.st_ino, about.st_mtime_ns) if about else (0, 0)


def read_clients(path: Path) -> dict[str, Client]:
    """The clients of a file by their names; none if it is not there.

    Raises:
        ConfigError: it is not what ``add_client`` writes.
    """
    try:
        clients = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError("clients", f"{path} is no JSON", "Restore it, or remove it") from error
    if not isinstance(clients, dict) or not all(map(_NAME.fullmatch, clients)):
        raise _damaged(path)
    return {name: _parse(kept, path) for name, kept in clients.items()}


def _parse(kept: Any, path: Path) -> Client:
    bounds = dict(kept) if isinstance(kept, dict) else {"key": kept}
    key = bounds.pop("key", None)
    if not (isinstance(key, str) and _HASH.fullmatch(key)):
        raise _damaged(path)
    return Client(key, Allowance.from_values(bounds))


def _damaged(path: Path) -> ConfigError:
    return ConfigError("clients", f"{path} holds more than names, hashes and bounds", "Restore it")


def add_client(path: Path, name: str, allowance: Allowance = UNBOUND) -> str:
    """Give a client a key; returns the key, which is kept nowhere.

    Raises:
        ConfigError: the name is taken, or no name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError("name", f"{name!r:.80} is no name", "Use letters, digits, '.', '_', '-'")
    key = f"ofr-{secrets.token_urlsafe(32)}"
    with _locked(path) as clients:
        if name in clients:
            raise ConfigError("name", f"{name!r} has a key", "Remove the client first")
        _write(path, {**clients, name: Client(_hash(key), allowance)})
    return key


def bound_client(path: Path, name: str, allowance: Allowance) -> None:
    """Say anew what a client may ask; its key stays.

    Raises:
        ConfigError: there is no such client.
    """
    with _locked(path) as clients:
        _require_client(clients, name)
        _write(path, {**clients, name: Client(clients[name].key, allowance)})


def remove_client(path: Path, name: str) -> None:
    """Take a client's key away.

    Raises:
        ConfigError: there is no such client.
    """
    with _locked(path) as clients:
        _require_client(clients, name)
        _write(path, {each: known for each, known in clients.items() if each != name})


def _require_client(clients: Mapping[str, Client], name: str) -> None:
    if name not in clients:
        raise ConfigError("name", f"{name!r:.80} is no client", "See offramp clients list")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[dict[str, Client]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(path.with_suffix(".lock")):
        yield read_clients(path)


def _write(path: Path, clients: Mapping[str, Client]) -> None:
    kept: dict[str, Any] = {}
    for name, client in clients.items():
        bounds = client.allowance.to_values()
        kept[name] = {"key": client.key, **bounds} if bounds else client.key
    write_durably(path, json.dumps(kept, indent=2, sort_keys=True).encode())


def _hash(key: str) -> str:
    # Quick on purpose: keys are drawn from 2^256, which nobody can try out.
    return hashlib.sha256(key.encode()).hexdigest()
