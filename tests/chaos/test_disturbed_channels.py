"""What is done to a channel while clients ask: the worker says so, and no answer changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
    offer(scene, load_or_create_key(scene.data / "stranger.pem").sign)


def weights_are_not_finite(scene: Scene) -> None:
    offer(scene, scene.bench.key.sign, lambda x: np.full_like(x, np.nan))


def weights_are_of_another_type(scene: Scene) -> None:
    offer(scene, scene.bench.key.sign, lambda x: x.astype(np.float64))


def offer(
    scene: Scene,
    sign: Callable[[bytes], bytes],
    spoil: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> None:
    """Put a release at the head behind the publisher's back."""
    found = scene.registry.head()
    assert found is not None
    manifest = scene.bench.verifier().read(found.envelope)
    tensors = load(scene.bench.ledger.blob(manifest.digest))
    blob = save(tensors | {"canned.features": spoil(tensors["canned.features"])})
    manifest = replace(
        manifest, generation=found.generation + 1, digest=digest_of(blob), size=len(blob)
    )
    scene.registry.put_blob(blob)
    head = Head(manifest.generation, 1, sign(manifest.to_bytes()), manifest.digest)
    scene.registry.promote(head, found.generation)


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
    (weights_are_not_finite, AckState.NACK, "not_finite: ", put_the_head_back),
    (weights_are_of_another_type, AckState.NACK, "bad_shape: ", put_the_head_back),
    (weights_are_damaged, AckState.NACK, "digest_mismatch: ", promote_again),
    (the_clock_is_fast, AckState.STALE, "expired", the_clock_is_slow),
    (the_clock_is_slow, AckState.ACK, "", the_clock_is_fast),
]
"""What is done, what the worker then says and why, or why it cannot say so, and what heals it."""


def test_one_disturbance_after_the_other(scene: Scene) -> None:
    for act, state, said, heal in DISTURBANCES:
        running = scene.worker.current.generation
        act(scene)
        assert scene.says() == (state, running), act
        assert said in scene.worker.report.reason + scene.worker.unreported, act
        heal(scene)
        assert scene.says() == (AckState.ACK, scene.bench.publisher.promoted), act
        assert scene.worker.report.reason == scene.worker.unreported == "", act
    assert scene.worker.current.generation == 2  # the damaged one, once it was whole
    # The control: under another policy a replay gives other tokens.
    assert torn(scene.clients.requests[-3:], lambda _: FixedExit(1))
