"""Whatever bytes lie in the registry or on disk, readers refuse them with one typed error."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import open_envelope, trusted_keys
from offramp.controller.release.registry import Head, InMemoryRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.worker.decoding.request import FULL_DEPTH
from offramp.worker.following.refresh import PolicyRefresher
from support.releases.readers import FIRST, READERS

HUGE_HEADER = (2**30).to_bytes(8, "little") + b"{"
QUIET = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mutated(raw: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some replaced, cut out or put in."""
    place = st.integers(0, len(raw))

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        spoilt = raw
        for start, length, new in changes:
            spoilt = spoilt[:start] + new + spoilt[start + length :]
        return spoilt

    change = st.tuples(place, st.integers(0, 40), st.binary(max_size=40))
    return st.lists(change, min_size=1, max_size=3).map(apply)


@pytest.mark.parametrize("name", READERS)
@QUIET
@given(data=st.data())
def test_every_reader(name: str, data: st.DataObject) -> None:
    """Blobs as if their digest had been signed."""
    reader = READERS[name]
    honest = data.draw(st.sampled_from(reader.seeds))
    check(reader.read, data.draw(mutated(honest) | st.binary()))


NESTED = (b"[" * 100_000, b'{"a":' * 100_000, b'{"channel":"a","channel":"b"}', HUGE_HEADER, b"")
BEYOND = (10**400, 1e308, -1, 2**53, 7, [10**400], "x")
"""What stands in place of each value in turn."""


@pytest.mark.parametrize("name", READERS)
def test_values_that_no_writer_writes(name: str) -> None:
    reader = READERS[name]
    for raw in NESTED:
        check(reader.read, raw)
    try:
        said = json.loads(reader.seeds[0])
    except ValueError:  # no JSON at all
        return
    record = said[0] if isinstance(said, list) else said
    for key, honest in list(record.items()):
        for value in BEYOND:
            record[key] = value
            check(reader.read, json.dumps(said).encode())
        record[key] = honest
    reader.read(json.dumps(said).encode())  # the control


def check(read: Callable[[bytes], Any], raw: bytes) -> None:
    with suppress(PolicyRefusedError):  # and nothing else
        read(raw)


@pytest.fixture(scope="module")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@QUIET
@given(data=st.data())
def test_envelopes_that_were_touched_never_open(key_folder: Path, data: st.DataObject) -> None:
    key = load_or_create_key(key_folder / "key.pem")
    honest = key.sign(FIRST.to_bytes())
    raw = data.draw(mutated(honest) | st.binary(max_size=300))
    trusted = trusted_keys(key.public_bytes)
    if raw == honest:
        assert open_envelope(raw, trusted) == FIRST.to_bytes()
        return
    with pytest.raises(PolicyRefusedError):
        open_envelope(raw, trusted)


@QUIET
@given(data=st.data())
def test_a_worker_outlives_any_head_and_state_file(
    key_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("state")
    junk = st.binary(max_size=120)
    for name in ("mark", "trial", "last-known-good", "quarantine", "starts", "identity"):
        if data.draw(st.booleans()):
            (folder / name).write_bytes(data.draw(junk))
    key = load_or_create_key(key_folder / "key.pem")
    registry = InMemoryRegistry()
    digest = registry.put_blob(data.draw(junk))
    registry.promote(Head(1, 1, data.draw(junk), digest), 0)
    registry.stamp(data.draw(junk), 60.0)
    verifier = ReleaseVerifier(trusted_keys(key.public_bytes), "demo", "aa", "bb")
    worker = PolicyRefresher(registry, verifier, folder, "w0")
    worker.poll_once()
    assert worker.current is FULL_DEPTH
