"""A small synthetic study in which the features tell, imperfectly, whether an exit is right."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.agents.study import Study
from offramp.controller.costs import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.worker.actor import ModelFacts

EXITS = (2, 4, 6)
LAYERS = 8


def make_traces(tokens: int, seed: int) -> TokenTraces:
    rng = np.random.default_rng(seed)
    shape = (tokens, len(EXITS))
    ease = rng.normal(size=(tokens, 1)) + np.asarray([-0.5, 0.3, 1.0])
    agree = (ease + 0.5 * rng.normal(size=shape) > 0).astype(np.float32)
    features = rng.normal(size=(*shape, CANDIDATES_V1.width)).astype(np.float32)
    features[:, :, 0] = ease
    features[:, :, 1] = 1 / (1 + np.exp(-2 * ease))
    # Rows of one document are contiguous and in order, as a recording leaves them.
    documents = 8
    document_N = (np.arange(tokens) * documents // tokens).astype(np.int32)
    softmax_NES = np.stack([features[:, :, 0], features[:, :, 1], 1 - features[:, :, 1]], axis=-1)
    return TokenTraces(
        header=TraceHeader(model="ab", schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS),
        features_NEF=features,
        softmax_NES=softmax_NES,
        exit_token_NE=np.where(agree > 0, 0, 1).astype(np.int32),
        agree_NE=agree,
        gap_NE=np.where(agree > 0, 0, -rng.exponential(2, size=shape)).astype(np.float32),
        right_NE=agree,
        full_right_N=np.ones(tokens, np.float32),
        position_N=np.arange(tokens, dtype=np.int32) - np.searchsorted(document_N, document_N),
        document_N=document_N,
        documents=tuple(f"{n:064x}" for n in range(documents)),
    )


@pytest.fixture(scope="session")
def study() -> Study:
    return Study(
        train=make_traces(4000, seed=0),
        validation=make_traces(1500, seed=1),
        costs=CostTable(
            layer_s=1.0,
            head_s=0.5,
            probe_s=0.1,
            policy_s=0.02,
            fill_s=0.02,
            step_s=0.1,
            layers=LAYERS,
            machine="invented",
        ),
        candidates_VK=np.tile(np.arange(4, dtype=np.int32), (20, 1)),
        facts=ModelFacts(model="ab", tokenizer="cd", layers=LAYERS, vocab=20, context=64, width=4),
    )
