"""Whoever holds the registry can break nothing: each attack has its exact refusal, and the running
policy does not move. Checked through a refresher on both registries."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file

from offramp.controller.errors import Refusal
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.policies.kinds import MAX_BLOB_BYTES
from offramp.controller.release.registry import AckState
from support.releases.hostile import Hostile

Site = Any
Attack = Callable[[Site, Any, bytes], Any]


@pytest.fixture
def running(site: Site, make_mlp: Any) -> Any:
    """A worker that runs generation 1."""
    site.serve(make_mlp(1))
    refresher = site.refresher()
    assert refresher.poll_once().state is AckState.ACK
    assert refresher.current.generation == 1
    return refresher


def check_refused(site: Site, running: Any, reason: Refusal) -> None:
    before, mark = running.current, (site.folder / "state" / "w0" / "mark").read_bytes()
    ack = running.poll_once()
    assert ack.state is AckState.NACK, ack
    assert ack.reason.startswith(f"{reason.value}: "), ack.reason
    assert (ack.generation, ack.digest) == (before.generation, before.digest)
    assert running.current is before
    assert (site.folder / "state" / "w0" / "mark").read_bytes() == mark
    assert [each.state for each in site.registry.acks()] == [AckState.NACK]


def test_an_honest_release_is_taken(site: Site, running: Any, make_mlp: Any) -> None:
    # The control for everything below: the same path, nothing spoilt.
    manifest, blob = site.draft(make_mlp(2))
    site.offer(manifest, blob)
    ack = running.poll_once()
    assert (ack.state, ack.reason, ack.generation) == (AckState.ACK, "", 2)
    assert running.current.digest == manifest.digest


SIGNED: dict[str, tuple[dict[str, Any], Refusal]] = {
    "wrong channel": ({"channel": "other"}, Refusal.WRONG_CHANNEL),
    "wrong model": ({"model": "cc"}, Refusal.WRONG_MODEL),
    "wrong tokenizer": ({"tokenizer": "cc"}, Refusal.WRONG_TOKENIZER),
    "expired": ({"expires_at": 1_799_999_999.0}, Refusal.EXPIRED),
    "unknown version": ({"format_version": 99}, Refusal.BAD_FORMAT),
    "unknown kind": ({"kind": "oracle"}, Refusal.BAD_FORMAT),
    "unknown schema": ({"schema": "0" * 64}, Refusal.WRONG_SCHEMA),
    "other shapes": ({"shapes": {}}, Refusal.BAD_SHAPE),
    "size too small": ({"size": 10}, Refusal.TOO_LARGE),
    "size too big": ({"size": MAX_BLOB_BYTES}, Refusal.DIGEST_MISMATCH),
    "another threshold than packed": ({"params": {"threshold": -9.0}}, Refusal.BAD_FORMAT),
    "a kind that lacks values": ({"params": {}}, Refusal.BAD_FORMAT),
}


@pytest.mark.parametrize("name", SIGNED)
def test_signed_but_wrong(site: Site, running: Any, make_mlp: Any, name: str) -> None:
    changes, reason = SIGNED[name]
    manifest, blob = site.draft(make_mlp(2))
    site.offer(replace(manifest, **changes), blob)
    check_refused(site, running, reason)


def nan(weight: Any) -> Any:
    spoilt = weight.copy()
    spoilt[0] = np.nan
    return spoilt


BLOBS: dict[str, tuple[dict[str, Any], Refusal]] = {
    "NaN weights": ({"layers__0__bias": np.full(8, np.nan, np.float32)}, Refusal.NOT_FINITE),
    "infinite canned input": (
        {"canned__features": np.full((16, 11), np.inf, np.float32)},
        Refusal.NOT_FINITE,
    ),
    "layers that do not chain": (
        {"layers__1__weight": np.zeros((5, 1), np.float32)},
        Refusal.BAD_SHAPE,
    ),
    "a float64 layer": ({"layers__0__bias": np.zeros(8, np.float64)}, Refusal.BAD_SHAPE),
    "a layer without bias": (
        {"layers__2__weight": np.zeros((1, 1), np.float32)},
        Refusal.BAD_SHAPE,
    ),
    "a candidate outside the vocabulary": (
        {"candidates": np.full((7, 3), 7, np.int32)},
        Refusal.BAD_SHAPE,
    ),
    "a negative candidate": ({"candidates": np.full((7, 3), -1, np.int32)}, Refusal.BAD_SHAPE),
    "float candidates": ({"candidates": np.zeros((7, 3), np.float32)}, Refusal.BAD_SHAPE),
    "canned decisions of another policy": (
        {"layers__1__bias": np.full(1, 100, np.float32)},
        Refusal.CANNED_INPUTS,
    ),
    "canned inputs of another width": (
        {"canned__features": np.zeros((16, 3), np.float32)},
        Refusal.BAD_SHAPE,
    ),
    "too few canned decisions": ({"canned__leave": np.zeros(3, np.uint8)}, Refusal.BAD_SHAPE),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_spoilt_blob(site: Site, running: Any, make_mlp: Any, respell: Any, name: str) -> None:
    tensors, reason = BLOBS[name]
    site.offer(*respell(*site.draft(make_mlp(2)), **tensors))
    check_refused(site, running, reason)


@pytest.mark.parametrize(
    "blob", [pickle.dumps({"a": 1}), b"PK\x03\x04zip", b"{}", b"\xff" * 64], ids=repr
)
def test_anything_but_safetensors(
    site: Site, running: Any, make_mlp: Any, fit: Any, blob: bytes
) -> None:
    manifest, _ = site.draft(make_mlp(2))
    site.offer(fit(manifest, blob), blob)
    check_refused(site, running, Refusal.NOT_SAFETENSORS)


def saved_agent(hostile: Hostile, folder: Path) -> bytes:
    """What Stable-Baselines3 saves; it pickles what JSON cannot say."""
    save_to_zip_file(folder / "agent.zip", data={"policy_class": hostile})
    return (folder / "agent.zip").read_bytes()


@pytest.mark.parametrize("is_zip", [False, True], ids=["pickle", "SB3 zip"])
def test_nothing_that_executes_code_is_ever_loaded(
    site: Site, running: Any, make_mlp: Any, fit: Any, tmp_path: Path, is_zip: bool
) -> None:
    hostile = Hostile(tmp_path / "mark")
    blob = saved_agent(hostile, tmp_path) if is_zip else pickle.dumps(hostile)
    manifest, _ = site.draft(make_mlp(2))
    site.offer(fit(manifest, blob), blob)
    check_refused(site, running, Refusal.NOT_SAFETENSORS)
    assert not hostile.mark.exists()
    # The control: whoever does load it runs its code.
    if is_zip:
        load_from_zip_file(tmp_path / "agent.zip")
    else:
        pickle.loads(blob)
    assert hostile.mark.exists()


def test_a_blob_over_the_limit(site: Site, running: Any, make_mlp: Any, fit: Any) -> None:
    manifest, _ = site.draft(make_mlp(2))
    blob = bytes(MAX_BLOB_BYTES + 1)
    site.offer(fit(manifest, blob), blob)
    check_refused(site, running, Refusal.TOO_LARGE)


def test_a_blob_swapped_under_its_digest(site: Site, running: Any, make_mlp: Any) -> None:
    manifest, blob = site.draft(make_mlp(2))
    site.offer(manifest, blob)
    site.store_raw(manifest.digest, bytes([blob[0]]) + bytes(len(blob) - 1))
    check_refused(site, running, Refusal.DIGEST_MISMATCH)


def test_a_blob_that_went_missing_may_come_back(site: Site, running: Any, make_mlp: Any) -> None:
    manifest, blob = site.draft(make_mlp(2))
    site.offer(manifest, blob)
    site.store_raw(manifest.digest, None)
    check_refused(site, running, Refusal.MISSING_BLOB)
    site.store_raw(manifest.digest, blob)
    assert running.poll_once().state is AckState.ACK
    assert running.current.generation == 2


def tampered(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (0, Refusal.BAD_FORMAT),
        (4, Refusal.FOREIGN_KEY),
        (20, Refusal.BAD_SIGNATURE),
        (84, Refusal.BAD_SIGNATURE),
        (-2, Refusal.BAD_SIGNATURE),
    ],
)
def test_a_tampered_envelope(
    site: Site, running: Any, make_mlp: Any, place: int, reason: Refusal
) -> None:
    manifest, blob = site.draft(make_mlp(2))
    raw = site.key.sign(manifest.to_bytes())
    site.offer(manifest, blob, tampered(raw, place % len(raw)))
    check_refused(site, running, reason)


def test_a_foreign_key(site: Site, running: Any, make_mlp: Any, tmp_path: Path) -> None:
    manifest, blob = site.draft(make_mlp(2))
    foreign = load_or_create_key(tmp_path / "foreign.pem")
    site.offer(manifest, blob, foreign.sign(manifest.to_bytes()))
    check_refused(site, running, Refusal.FOREIGN_KEY)


def test_a_foreign_key_under_a_trusted_name(
    site: Site, running: Any, make_mlp: Any, tmp_path: Path
) -> None:
    manifest, blob = site.draft(make_mlp(2))
    foreign = load_or_create_key(tmp_path / "foreign.pem").sign(manifest.to_bytes())
    site.offer(manifest, blob, foreign[:4] + site.key.key_id.encode() + foreign[20:])
    check_refused(site, running, Refusal.BAD_SIGNATURE)


def test_a_timestamp_is_no_release(site: Site, running: Any, make_mlp: Any) -> None:
    manifest, blob = site.draft(make_mlp(2))
    site.offer(manifest, blob, site.registry.fresh())
    check_refused(site, running, Refusal.BAD_FORMAT)


@pytest.mark.parametrize("claim", [{"generation": 9}, {"epoch": 9}])
def test_a_head_that_says_more_than_was_signed(
    site: Site, running: Any, make_mlp: Any, claim: dict[str, int]
) -> None:
    manifest, blob = site.draft(make_mlp(2))
    raw = site.key.sign(manifest.to_bytes())
    site.wipe()
    site.publisher.heartbeat()
    site.offer(replace(manifest, **claim), blob, raw)
    check_refused(site, running, Refusal.BAD_FORMAT)


def test_an_older_generation(site: Site, running: Any, make_mlp: Any) -> None:
    site.serve(make_mlp(2))
    assert running.poll_once().generation == 2
    old, blob = site.draft(make_mlp(1), generation=1)
    site.wipe()
    site.offer(old, blob)
    check_refused(site, running, Refusal.ROLLBACK)


def test_an_older_generation_after_a_restart(site: Site, running: Any, make_mlp: Any) -> None:
    site.serve(make_mlp(2))
    running.poll_once()
    old, blob = site.draft(make_mlp(1), generation=1)
    site.wipe()
    site.offer(old, blob)
    restarted = site.refresher()
    assert restarted.current.generation == 2
    check_refused(site, restarted, Refusal.ROLLBACK)


def test_an_older_generation_is_news_to_a_new_worker(
    site: Site, running: Any, make_mlp: Any
) -> None:
    # Negative control: without the mark nothing stands against it.
    head = site.registry.head()
    blob = site.registry.get_blob(head.digest, 10**6)
    site.wipe()
    site.registry.put_blob(blob)
    site.registry.promote(head, 0)
    assert site.refresher("new").poll_once().generation == 1


def test_two_releases_of_one_number(site: Site, running: Any, make_mlp: Any) -> None:
    other, blob = site.draft(make_mlp(9), generation=1)
    site.wipe()
    site.offer(other, blob)
    check_refused(site, running, Refusal.EQUIVOCATION)


def test_a_refused_head_is_not_fetched_again(
    site: Site, running: Any, make_mlp: Any, respell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.offer(*respell(*site.draft(make_mlp(2)), **BLOBS["NaN weights"][0]))
    check_refused(site, running, Refusal.NOT_FINITE)
    fetched: list[str] = []
    monkeypatch.setattr(site.registry, "get_blob", lambda digest, limit: fetched.append(digest))
    check_refused(site, running, Refusal.NOT_FINITE)
    assert fetched == []


def test_a_good_release_after_a_refused_one_is_taken(
    site: Site, running: Any, make_mlp: Any, respell: Any
) -> None:
    site.offer(*respell(*site.draft(make_mlp(2)), **BLOBS["NaN weights"][0]))
    check_refused(site, running, Refusal.NOT_FINITE)
    site.offer(*site.draft(make_mlp(3), generation=3))
    ack = running.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 3)
