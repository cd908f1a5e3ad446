from __future__ import annotations

import pickle
import stat
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.deploy.clients.client_keys import (
    CLIENTS,
    SHARED,
    ClientKeys,
    add_client,
    read_clients,
    remove_client,
)

UNKNOWN_BOUND = '{"alice": {"key": "' + 64 * "0" + '", "seconds": 3}}'


def test_a_client_is_told_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "home" / CLIENTS
    alice, bob = add_client(path, "alice"), add_client(path, "bob")
    keys = ClientKeys(path, shared="one for all")
    assert keys.are_asked_for
    assert keys.client(alice) == "alice"
    assert keys.client(bob) == "bob"
    assert keys.client("one for all") == SHARED
    for wrong in ("", "alice", alice[:-1], alice + "x", read_clients(path)["alice"].key):
        assert keys.client(wrong) is None


def test_only_hashes_are_kept_and_only_for_the_owner(tmp_path: Path) -> None:
    path = tmp_path / CLIENTS
    key = add_client(path, "alice")
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = ClientKeys(path, shared="a secret that travels")
    # As it is sent to the process that listens.
    assert b"a secret that travels" not in pickle.dumps(keys)


def test_what_is_added_or_removed_counts_at_once(tmp_path: Path) -> None:
    path = tmp_path / CLIENTS
    alice = add_client(path, "alice")
    keys = ClientKeys(path)
    bob = add_client(path, "bob")
    assert keys.client(bob) == "bob"
    remove_client(path, "alice")
    assert keys.client(alice) is None
    remove_client(path, "bob")
    assert keys.client(bob) is None
    # The last one's going does not open the door.
    assert keys.are_asked_for


def test_without_keys_none_is_asked_for(tmp_path: Path) -> None:
    assert not ClientKeys().are_asked_for
    assert not ClientKeys(tmp_path / CLIENTS).are_asked_for


def test_a_damaged_file_stops_the_start_but_not_the_server(tmp_path: Path) -> None:
    path = tmp_path / CLIENTS
    alice = add_client(path, "alice")
    keys = ClientKeys(path)
    for content in ("{", "[]", '{"alice": "secret"}', '{"a b": "' + 64 * "0" + '"}', UNKNOWN_BOUND):
        path.unlink()
        path.write_text(content)
        assert keys.client(alice) == "alice"
        with pytest.raises(ConfigError, match="clients"):
            ClientKeys(path)


@pytest.mark.parametrize("name", ["", "a b", "-a", "a\n", "ä", 65 * "a"])
def test_a_name_must_be_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        add_client(tmp_path / CLIENTS, name)


def test_the_commands_add_list_and_remove(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFRAMP_HOME", str(tmp_path))
    status, key = cli("clients", "add", "alice")
    assert status == 0
    assert ClientKeys(tmp_path / CLIENTS).client(key.strip()) == "alice"
    assert "has a key" in cli("clients", "add", "alice")[1]
    assert cli("clients", "list") == (0, "alice: no bounds\n")
    bounds = ("--requests-per-minute", 60, "--quality", "lossless")
    assert cli("clients", "bound", "alice", *bounds)[0] == 0
    assert cli("clients", "list")[1] == "alice: requests_per_minute 60, quality lossless\n"
    assert ClientKeys(tmp_path / CLIENTS).client(key.strip()) == "alice"
    assert "quality: 'most' is no share" in cli("clients", "bound", "alice", "--quality", "most")[1]
    assert cli("clients", "bound", "bob")[0] == 1
    assert cli("clients", "remove", "alice")[0] == 0
    assert cli("clients", "list") == (0, "")
    assert cli("clients", "remove", "alice")[0] == 1
