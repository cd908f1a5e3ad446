"""What is done to a channel while clients ask: the worker says so, and no answer changes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.policies.kinds import digest_of
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.registry import AckState, Head
from support.releases.clients import torn
from support.releases.scene import Scene

DAYS_S = 24 * 3600.0
Act = Callable[[Scene], object]


def nothing_is_left(scene: Scene) -> None:
    scene.client.flushall()


def memory_is_full(scene: Scene) -> None:
    scene.client.config_set("maxmemory", 1)


def memory_is_there(scene: Scene) -> None:
    scene.client.config_set("maxmemory", 0)


def writing_is_forbidden(scene: Scene) -> None:
    scene.client.acl_setuser("default", enabled=True, commands=["-@write"])


def writing_is_allowed(scene: Scene) -> None:
    scene.client.acl_setuser("default", enabled=True, commands=["+@all"])


def a_number_is_forged(scene: Scene) -> None:
    scene.client.hset("offramp:{demo}:head", "gen", "1000000")


def a_stranger_signs(scene: Scene) -> None:
    offer(scene, sign=load_or_create_key(scene.data / "stranger.pem").sign)


def offer(
    scene: Scene,
    spoil: Callable[[bytes], bytes] = lambda blob: blob,
    *,
    sign: Callable[[bytes], bytes] | None = None,
    ahead: int = 1,
    respell: Callable[[bytes], bytes] = lambda raw: raw,
    **changes: Any,
) -> None:
    """Put a release at the head behind the publisher's back, signed by its key if by no other's."""
    found = scene.registry.head()
    assert found is not None
    honest = scene.bench.verifier().read(found.envelope)
    blob = spoil(scene.bench.ledger.blob(honest.digest))
    told: dict[str, Any] = {
        "generation": found.generation + ahead,
        "digest": digest_of(blob),
        "size": len(blob),
    }
    manifest = replace(honest, **told | changes)
    envelope = (sign or scene.bench.key.sign)(respell(manifest.to_bytes()))
    scene.registry.discard_head()
    scene.registry.put_blob(blob)
    scene.registry.promote(Head(manifest.generation, 1, envelope, manifest.digest), 0)


def with_inputs(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bytes], bytes]:
    """Changes the recorded inputs that a policy must decide as it did."""

    def spoil(blob: bytes) -> bytes:
        tensors = load(blob)
        return bytes(save(tensors | {"canned.features": change(tensors["canned.features"])}))

    return spoil


def poison(
    said: str, spoil: Callable[[bytes], bytes] = lambda blob: blob, **changes: Any
) -> tuple[Act, AckState, str, Act]:
    """A release that the publisher's key signed, and that must be refused so."""
    return partial(offer, spoil=spoil, **changes), AckState.NACK, said, put_the_head_back


def weights_are_damaged(scene: Scene) -> None:
    head = scene.bench.serve(3)
    scene.client.set(f"offramp:{{demo}}:blob:{head.digest}", b"junk")


def the_clock_is_fast(scene: Scene) -> None:
    scene.bench.now += 3 * DAYS_S


def the_clock_is_slow(scene: Scene) -> None:
    scene.bench.now -= 3 * DAYS_S


def promote_again(scene: Scene) -> None:
    scene.bench.publisher.promote(scene.bench.publisher.promoted)


def put_the_head_back(scene: Scene) -> None:
    scene.registry.discard_head()
    promote_again(scene)


DISTURBANCES: list[tuple[Act, AckState, str, Act]] = [
    (nothing_is_left, AckState.STALE, "lost its head", promote_again),
    (memory_is_full, AckState.ACK, "is out of memory", memory_is_there),
    (writing_is_forbidden, AckState.ACK, "does not allow it", writing_is_allowed),
    (a_number_is_forged, AckState.NACK, "bad_format: ", promote_again),
    (a_stranger_signs, AckState.NACK, "foreign_key: ", promote_again),
    (weights_are_damaged, AckState.NACK, "digest_mismatch: ", promote_again),
    (the_clock_is_fast, AckState.STALE, "expired", the_clock_is_slow),
    (the_clock_is_slow, AckState.ACK, "", the_clock_is_fast),
    poison("not_finite: ", with_inputs(lambda x: np.full_like(x, np.nan))),
    poison("bad_shape: ", with_inputs(lambda x: x.astype(np.float64))),
    poison("bad_shape: ", with_inputs(lambda x: x[:, :2])),
    poison("not_safetensors: ", lambda blob: blob[:-9]),
    poison("not_safetensors: ", lambda blob: (2**30).to_bytes(8, "little") + blob[8:]),
    poison("not_safetensors: ", pickle.dumps),
    poison("wrong_model: ", model="ff"),
    poison("wrong_tokenizer: ", tokenizer="ff"),
    poison("wrong_channel: ", channel="other"),
    poison("expired: ", expires_at=1.0),
    poison("bad_format: ", respell=lambda raw: raw[:-1] + b',"kind":"fixed"}'),
    poison("rollback: ", ahead=-1),
    poison("equivocation: ", with_inputs(lambda x: x + 1), ahead=0),
]
"""What is done, what the worker then says and why, or why it cannot say so, and what heals it."""


def test_one_disturbance_after_the_other(scene: Scene) -> None:
    for number, (act, state, said, heal) in enumerate(DISTURBANCES):
        running = scene.worker.current.generation
        act(scene)
        assert scene.says() == (state, running), (number, scene.worker.report)
        assert said in scene.worker.report.reason + scene.worker.unreported, number
        heal(scene)
        assert scene.says() == (AckState.ACK, scene.bench.publisher.promoted), number
        assert scene.worker.report.reason == scene.worker.unreported == "", number
    assert scene.worker.current.generation == 2  # the damaged one, once it was whole
    # The control: under another policy a replay gives other tokens.
    assert torn(scene.clients.requests[-3:], lambda _: FixedExit(1))
