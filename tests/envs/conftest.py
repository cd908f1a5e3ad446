"""Synthetic recordings, small and seeded. Shape suffixes: T tokens, E exits, F features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import TokenTraces

MakeChunk = Callable[..., TraceChunk]


@pytest.fixture(scope="session")
def header() -> TraceHeader:
    return TraceHeader(model="tiny", schema=CANDIDATES_V1.digest, exits=(2, 4, 7), layers=8)


@pytest.fixture(scope="session")
def costs() -> CostTable:
    return CostTable(
        layer_s=1.0,
        head_s=2.0,
        probe_s=0.11,
        policy_s=0.03,
        fill_s=0.05,
        step_s=0.4,
        layers=8,
        machine="invented",
    )


@pytest.fixture(scope="session")
def make_chunk() -> MakeChunk:
    def make(
        document: str = "a" * 64, tokens: int = 20, exits: int = 3, seed: int = 0
    ) -> TraceChunk:
        rng = np.random.default_rng(seed)
        shape = (tokens, exits)
        exit_token_TE = rng.integers(4, size=shape, dtype=np.int32)
        full_token_T = rng.integers(4, size=tokens, dtype=np.int32)
        gap_TE = np.where(
            exit_token_TE == full_token_T[:, None], 0, -rng.exponential(3, size=shape)
        ).astype(np.float32)
        return TraceChunk(
            document=document,
            position_T=np.arange(tokens, dtype=np.int32),
            features_TEF=rng.random((*shape, CANDIDATES_V1.width), dtype=np.float32),
            softmax_TES=rng.random((*shape, 3), dtype=np.float32),
            exit_token_TE=exit_token_TE,
            full_token_T=full_token_T,
            next_token_T=rng.integers(4, size=tokens, dtype=np.int32),
            gap_TE=gap_TE,
        )

    return make


@pytest.fixture(scope="session")
def traces(header: TraceHeader, make_chunk: MakeChunk) -> TokenTraces:
    chunks = [make_chunk(document=f"{i}" * 64, seed=i) for i in range(3)]
    return TokenTraces.from_chunks(header, chunks)
