"""Both registries, and a channel with a publisher and a worker on either of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from safetensors.numpy import load, save

from offramp.controller.features import CANDIDATES_V1
from offramp.controller.keys.envelopes import SigningKey
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.codec import Tensors
from offramp.controller.policies.kinds import digest_of, pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, NeverExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Head, InMemoryRegistry, PolicyRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker.following.refresh import PolicyRefresher

MODEL, TOKENIZER = "aa11", "bb22"
NOW = 1_800_000_000.0

_channels = itertools.count()


def mlp(seed: int, vocab: int = 7) -> MlpPolicy:
    """A small random policy with a candidate table."""
    rng = np.random.default_rng(seed)
    sizes = [CANDIDATES_V1.width, 8, 1]
    weights = [
        (rng.normal(size=(i, o)).astype(np.float32), rng.normal(size=o).astype(np.float32))
        for i, o in itertools.pairwise(sizes)
    ]
    table_VK = rng.integers(0, vocab, size=(vocab, 3), dtype=np.int32)
    return MlpPolicy((2, 4), CANDIDATES_V1, weights, 0.25, table_VK)


def canned(rows: int = 16) -> Any:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, CANDIDATES_V1.width)).astype(np.float32)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def redis_registry(redis_url: str) -> Iterator[RedisRegistry]:
    registry = RedisRegistry(redis_url, f"c{next(_channels)}")
    yield registry
    registry.close()


@pytest.fixture(params=["memory", "redis"])
def registry(request: pytest.FixtureRequest) -> PolicyRegistry:
    if request.param == "memory":
        return InMemoryRegistry()
    found: PolicyRegistry = request.getfixturevalue("redis_registry")
    return found


@dataclass
class Site:
    """One channel: its registry, its publisher, and what a worker on it needs."""

    registry: PolicyRegistry
    folder: Path
    wipe: Callable[[], None]
    store_raw: Callable[[str, bytes | None], None]
    channel: str = "demo"
    now: list[float] = field(default_factory=lambda: [NOW])

    def clock(self) -> float:
        return self.now[0]

    @property
    def key(self) -> SigningKey:
        return load_or_create_key(self.folder / "key.pem")

    @property
    def publisher(self) -> Publisher:
        ledger = FolderLedger(self.folder / "ledger")
        return Publisher(self.registry, ledger, self.key, self.channel, self.clock)

    def release(self, policy: ExitPolicy, **options: Any) -> Head:
        given: dict[str, Any] = {
            "model": MODEL,
            "tokenizer": TOKENIZER,
            "training": {"seed": 0},
            "metrics": {"speedup": 1.5},
            # Only `offramp calibrate` certifies; these policies were made up.
            "uncertified": "certificate" not in options and not isinstance(policy, NeverExit),
        }
        return self.publisher.release(pack_policy(policy, canned()), **(given | options))

    def serve(self, policy: ExitPolicy, **options: Any) -> Head:
        release = self.release(policy, **options)
        self.publisher.promote(release.generation)
        return release

    def draft(self, policy: ExitPolicy, generation: int = 2) -> tuple[Manifest, bytes]:
        """A release by hand, to be spoilt before it is signed."""
        bundle = PolicyBundle.draft(
            pack_policy(policy, canned()),
            model=MODEL,
            tokenizer=TOKENIZER,
            training={},
            metrics={},
            created_at=NOW,
        )
        manifest = replace(bundle.manifest, channel=self.channel, epoch=1, generation=generation)
        return manifest, bundle.blob

    def offer(self, manifest: Manifest, blob: bytes, envelope: bytes | None = None) -> Head:
        """Put a release at the head behind the publisher's back, as who holds Redis could."""
        raw = envelope or self.key.sign(manifest.to_bytes())
        head = Head(manifest.generation, manifest.epoch, raw, manifest.digest)
        self.registry.put_blob(blob)
        self.store_raw(manifest.digest, blob)
        found = self.registry.head()
        self.registry.promote(head, found.generation if found else 0)
        return head

    def verifier(self) -> ReleaseVerifier:
        trusted = trusted_keys(self.key.public_bytes)
        return ReleaseVerifier(trusted, self.channel, MODEL, TOKENIZER, self.clock)

    def refresher(self, name: str = "w0") -> PolicyRefresher:
        state = self.folder / "state" / name
        return PolicyRefresher(self.registry, self.verifier(), state, name, poll_s=5.0)


def respelt(manifest: Manifest, blob: bytes, **tensors: Any) -> tuple[Manifest, bytes]:
    """The release with some tensors replaced, digest, size and shapes made to fit again."""
    changed: Tensors = load(blob) | {name.replace("__", "."): v for name, v in tensors.items()}
    names = {np.dtype(np.float32): "F32", np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8"}
    spoilt = save(changed)
    shapes = {name: (names.get(v.dtype, "F64"), v.shape) for name, v in changed.items()}
    return fitted(replace(manifest, shapes=shapes), spoilt), spoilt


def fitted(manifest: Manifest, blob: bytes) -> Manifest:
    return replace(manifest, digest=digest_of(blob), size=len(blob))


@pytest.fixture
def site(registry: PolicyRegistry, tmp_path: Path) -> Site:
    if isinstance(registry, InMemoryRegistry):
        memory = registry

        def store(digest: str, blob: bytes | None) -> None:
            memory._blobs.pop(digest, None)
            if blob is not None:
                memory._blobs[digest] = blob

        return Site(memory, tmp_path, lambda: InMemoryRegistry.__init__(memory), store)
    assert isinstance(registry, RedisRegistry)
    return redis_site(registry, tmp_path)


def redis_site(registry: RedisRegistry, folder: Path) -> Site:
    client: redis.Redis = registry._client

    def store_redis(digest: str, blob: bytes | None) -> None:
        key = registry._key(f"blob:{digest}")
        client.delete(key)
        if blob is not None:
            client.set(key, blob)

    return Site(registry, folder, lambda: _flush(client), store_redis)


def _flush(client: redis.Redis) -> None:
    client.flushdb()


@pytest.fixture
def make_site() -> Callable[[RedisRegistry, Path], Site]:
    return redis_site


@pytest.fixture
def make_mlp() -> Callable[[int], MlpPolicy]:
    return mlp


@pytest.fixture
def respell() -> Callable[..., tuple[Manifest, bytes]]:
    return respelt


@pytest.fixture
def fit() -> Callable[[Manifest, bytes], Manifest]:
    return fitted
