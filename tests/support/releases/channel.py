"""A channel with a publisher and a worker, for tests of what the worker does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from offramp.controller.keys.envelopes import SigningKey
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import Head, PolicyRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.worker.following.refresh import PolicyRefresher

MODEL, TOKENIZER = "aa", "bb"


class Bench:
    """A publisher and workers on one registry, with a clock that the test moves."""

    def __init__(self, registry: PolicyRegistry, folder: Path) -> None:
        self.registry = registry
        self.now = 1_800_000_000.0
        self.state_dir = folder / "state"
        self.key: SigningKey = load_or_create_key(folder / "key.pem")
        self.ledger = FolderLedger(folder / "ledger")
        self.publisher = Publisher(registry, self.ledger, self.key, "demo", lambda: self.now)

    def serve(self, layer: int, **options: Any) -> Head:
        release = self.release(layer, **options)
        self.publisher.promote(release.generation)
        return release

    def release(self, layer: int, **options: Any) -> Head:
        packed = pack_policy(FixedExit(layer), np.zeros((2, 3), np.float32))
        return self.publisher.release(
            packed,
            model=MODEL,
            tokenizer=TOKENIZER,
            training={},
            metrics={},
            **{"uncertified": True} | options,
        )

    def policy_of(self, generation: int) -> Policy:
        """What the ledger has of a release; 0 is full depth."""
        if generation == 0:
            return NeverExit()
        manifest = self.verifier().read(self.ledger.get(generation))
        return unpack_policy(manifest, self.ledger.blob(manifest.digest))

    def verifier(self) -> ReleaseVerifier:
        trusted = trusted_keys(self.key.public_bytes)
        return ReleaseVerifier(trusted, "demo", MODEL, TOKENIZER, lambda: self.now)

    def worker(self, poll_s: float = 5.0, **options: Any) -> PolicyRefresher:
        verifier = self.verifier()
        return PolicyRefresher(self.registry, verifier, self.state_dir, "w0", poll_s, **options)
