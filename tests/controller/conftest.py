"""Small seeded policies. Shape suffixes: N rows, F features, V vocabulary, K candidates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.controller.keys.envelopes import SigningKey
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.release.bundle import PolicyBundle
from support.releases.certificates import certificate


@pytest.fixture
def canned_NF() -> FloatArray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, CANDIDATES_V1.width)).astype(np.float32)


@pytest.fixture
def make_mlp() -> Callable[..., MlpPolicy]:
    def make(seed: int = 0, vocab: int = 7) -> MlpPolicy:
        rng = np.random.default_rng(seed)
        weights = [
            (
                rng.normal(size=(wide, narrow)).astype(np.float32),
                rng.normal(size=narrow).astype(np.float32),
            )
            for wide, narrow in pairwise([CANDIDATES_V1.width, 8, 1])
        ]
        table_VK = rng.integers(0, vocab, size=(vocab, 3), dtype=np.int32)
        return MlpPolicy((2, 4), CANDIDATES_V1, weights, 0.25, table_VK)

    return make


@pytest.fixture
def bundle(make_mlp: Callable[..., MlpPolicy], canned_NF: FloatArray) -> PolicyBundle:
    packed = pack_policy(make_mlp(), canned_NF)
    return PolicyBundle.draft(
        packed,
        model="aa",
        tokenizer="bb",
        training={"seed": 1, "data": ["a", "b"]},
        metrics={"speedup": 1.25},
        certificate=certificate(packed.digest),
        created_at=1_800_000_000.5,
    )


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return load_or_create_key(tmp_path / "key.pem")
