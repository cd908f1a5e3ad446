"""Everything that reads what others may have written, with honest bytes to begin from."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from offramp.controller.adapters.adapter_index import AdapterIndex
from offramp.controller.keys.envelopes import ROOT_MAGIC, SigningKey
from offramp.controller.keys.root import Role, Root, open_envelope, trusted_keys
from offramp.controller.policies.kinds import digest_of, pack_policy, parse_blob, shapes_of
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.manifest import Manifest, Rollout
from offramp.controller.release.redis_registry import ack_of
from offramp.controller.release.registry import Ack, AckState
from offramp.controller.release.trust import Mark, Stamp
from offramp.controller.watching.analysis import judge
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally, add_up, tallies_to_json
from support.releases.certificates import certificate
from support.releases.packable import DRAFTS, NETS, PLAIN, RULES

POLICIES: tuple[Policy, ...] = (*PLAIN, *NETS, *RULES, *DRAFTS)
KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
TRUSTED = trusted_keys(KEY.public_bytes)


@dataclass(frozen=True, slots=True)
class Reader:
    """One reader: what it refuses, it refuses with PolicyRefusedError, and with nothing else.

    Attributes:
        read: Reads bytes.
        seeds: What real writers wrote.
    """

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def bundled(policy: Policy, **facts: Any) -> PolicyBundle:
    width = 0 if policy.schema is None else policy.schema.width
    rows_NF = np.random.default_rng(9).random((8, width), dtype=np.float32)
    packed = pack_policy(policy, rows_NF)
    made: dict[str, Any] = {"model": "aa", "tokenizer": "bb", "training": {"seed": 1}}
    return PolicyBundle.draft(packed, metrics={}, created_at=0.0, **(made | facts))


BUNDLES = tuple(map(bundled, POLICIES))
FIRST = BUNDLES[0].manifest
CANARY = replace(
    FIRST,
    certificate=certificate(FIRST.digest),
    rollout=Rollout(percent=5, salt="s", stable_generation=1, stable_digest="a" * 64),
)
SIGNED = (FIRST.to_bytes(), CANARY.to_bytes())
MINE = Role.of([KEY.public_bytes])
ROOT = Root(version=1, root=MINE, release=MINE, timestamp=MINE)
NEXT = replace(ROOT, version=2, expires_at=60.0)
STAMP = Stamp(channel="demo", epoch=1, generation=3, issued_at=0.0, expires_at=60.0, root=2)
INDEX = AdapterIndex(
    kind="layer", model="aa", exits=(2, 4), digest="b" * 64, size=5, parts=("c" * 64,)
)


def open_release(raw: bytes) -> None:
    """An envelope, and the manifest in it; nobody else's key signs."""
    payload = open_envelope(raw, TRUSTED)
    assert payload in SIGNED, "what was never signed opens"
    Manifest.from_bytes(payload)


def read_weights(raw: bytes) -> None:
    """A blob under a manifest that fits it as well as one can: its signer lies throughout."""
    tensors = parse_blob(raw)
    said = {}
    with suppress(KeyError, ValueError, RecursionError):
        said = json.loads(tensors["policy"].tobytes())
    names = FIRST.__slots__ if isinstance(said, dict) else ()
    values = json.loads(FIRST.to_bytes()) | {n: v for n, v in dict(said).items() if n in names}
    values |= {"digest": digest_of(raw), "size": len(raw), "shapes": shapes_of(tensors)}
    manifest = Manifest.from_bytes(json.dumps(values).encode())
    unpack_policy(manifest, raw)


def read_acknowledgement(raw: bytes) -> None:
    """Tallies of a worker, as the overseer judges a canary by them."""
    told = ack_of({b"tallies": raw, **SAID})
    if told is not None:
        canary, stable = (add_up(each, told.tallies) for each in (3, 1))
        judge(Steps(), canary, stable)


ACK = Ack(
    worker="w0",
    boot="b",
    generation=3,
    digest="d" * 64,
    about=3,
    state=AckState.ACK,
    reason="",
    at=0.0,
)
SAID = {
    name.encode(): str(value).encode() for name, value in asdict(ACK).items() if name != "tallies"
}
TALLY = Tally(generation=3, tokens=4000, early=2000, seconds=80.0, layers=30_000, requests=100)
TALLIES = tallies_to_json([TALLY, replace(TALLY, generation=1)]).encode()

READERS: dict[str, Reader] = {
    "envelope": Reader(open_release, tuple(map(KEY.sign, SIGNED))),
    "manifest": Reader(
        Manifest.from_bytes, (CANARY.to_bytes(), *[each.manifest.to_bytes() for each in BUNDLES])
    ),
    "weights": Reader(read_weights, tuple(each.blob for each in BUNDLES)),
    "mark": Reader(Mark.from_bytes, (Mark.of(FIRST).to_bytes(),)),
    "stamp": Reader(Stamp.from_bytes, (STAMP.to_bytes(),)),
    "root": Reader(Root.from_bytes, (ROOT.to_bytes(),)),
    "signed root": Reader(ROOT.follow, (KEY.sign(NEXT.to_bytes(), ROOT_MAGIC),)),
    "certificate": Reader(Certificate.from_bytes, (certificate().to_bytes(),)),
    "adapters": Reader(AdapterIndex.from_bytes, (INDEX.to_bytes(),)),
    "acknowledgement": Reader(read_acknowledgement, (TALLIES,)),
}
