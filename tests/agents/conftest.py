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
    documents = 8
    return TokenTraces(
        header=TraceHeader(model="ab", schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS),
        features_NEF=features,
        margin_NE=features[:, :, 1].copy(),
        agree_NE=agree,
        gap_NE=np.where(agree > 0, 0, -rng.exponential(2, size=shape)).astype(np.float32),
        right_NE=agree,
        full_right_N=np.ones(tokens, np.float32),
        document_N=(np.arange(tokens) % documents).astype(np.int32),
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
        facts=ModelFacts(model="ab", tokenizer="cd", layers=LAYERS, vocab=20, context=64),
    )
