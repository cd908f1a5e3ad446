"""Whatever bytes lie in the registry or on disk, readers refuse them with one typed error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import Role, Root, open_envelope, trusted_keys
from offramp.controller.policies.kinds import digest_of, pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import Head, InMemoryRegistry
from offramp.controller.release.trust import Mark, ReleaseVerifier, Stamp
from offramp.worker.decoding.request import FULL_DEPTH
from offramp.worker.following.refresh import PolicyRefresher

PACKED = pack_policy(FixedExit(3), np.zeros((2, 3), np.float32))
MANIFEST = PolicyBundle.draft(
    PACKED, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
).manifest
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


@QUIET
@given(mutated(MANIFEST.to_bytes()) | st.binary())
@example(b"[" * 100_000)
@example(b'{"channel":"a","channel":"b"}')
def test_manifests(raw: bytes) -> None:
    check(Manifest.from_bytes, raw)


@QUIET
@given(st.binary(max_size=200))
@example(b'{"epoch":1,"generation":1,"digest":null}')
def test_marks_and_stamps(raw: bytes) -> None:
    check(Mark.from_bytes, raw)
    check(Stamp.from_bytes, raw)


ANYONE = Role.of([bytes(32)])
ROOT = Root(version=1, root=ANYONE, release=ANYONE, timestamp=ANYONE)


@QUIET
@given(mutated(ROOT.to_bytes()) | st.binary())
def test_roots(raw: bytes) -> None:
    check(Root.from_bytes, raw)
    check(ROOT.follow, b"OFN1OFT1" + raw)


@QUIET
@given(mutated(PACKED.blob) | st.binary())
@example(HUGE_HEADER)
@example(b"")
def test_blobs(raw: bytes) -> None:
    """As if their digest had been signed."""
    manifest = replace(MANIFEST, digest=digest_of(raw), size=len(raw))
    check(lambda blob: unpack_policy(manifest, blob), raw)


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
    honest = key.sign(MANIFEST.to_bytes())
    raw = data.draw(mutated(honest) | st.binary(max_size=300))
    trusted = trusted_keys(key.public_bytes)
    if raw == honest:
        assert open_envelope(raw, trusted) == MANIFEST.to_bytes()
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
