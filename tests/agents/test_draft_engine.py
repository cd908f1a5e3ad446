"""The environment of drafts against the engine: same layers, drafts, cycles, and same views.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from offramp.agents.corpus import Document
from offramp.agents.drafting.record import Continuations, record_continuations
from offramp.agents.drafting.replay import replay_drafts
from offramp.controller.features import SOFTMAX_V2, FeatureSchema, FloatArray
from offramp.controller.policy import IndexArray
from offramp.envs import TokenTraces
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from support.costs import measured
from support.models import make_model

EXITS = (1, 2, 4)
PROMPT, NEW, PENDING = 9, 40, 5


@dataclass
class Script:
    """Goes where a hash of the token's place says, and writes down what it is shown."""

    salt: int
    exits: tuple[int, ...] = EXITS
    schema: FeatureSchema = SOFTMAX_V2
    candidates_VK: None = None
    outlooks: list[list[float]] = field(default_factory=list)
    fresh: list[list[float]] = field(default_factory=list)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        self.outlooks += outlook_NC.tolist()
        return np.array([self._draw(row_C, 0, len(self.exits)) for row_C in outlook_NC])

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        self.outlooks += outlook_NC.tolist()
        if outlook_NC[0, 2] == 0:  # no open draft: surely along the recorded text
            self.fresh += features_NF[:, :-1].tolist()
        low = [here if self._draw(row_C, 0, 2) else here + 1 for row_C in outlook_NC]
        return np.array([self._draw(r, a, len(self.exits)) for r, a in zip(outlook_NC, low)])  # noqa: B905

    def _draw(self, outlook_C: FloatArray, low: int, high: int) -> int:
        step = round(float(outlook_C[0]) * 256)
        return low + (step * 2654435761 + self.salt * 97 + low * 13) % 1009 % (high - low + 1)


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    config = EngineConfig(max_pending=PENDING)
    return AdaptiveEngine(make_model("llama"), slots=1, config=config)


@pytest.fixture(scope="module")
def documents() -> list[tuple[Document, list[int]]]:
    rng = np.random.default_rng(0)
    texts = [Document.of(f"document {index}", f"{index}.py") for index in range(3)]
    return [(text, rng.integers(1, 90, size=PROMPT).tolist()) for text in texts]


@pytest.fixture(scope="module")
def traces(engine: AdaptiveEngine, documents: list[tuple[Document, list[int]]]) -> TokenTraces:
    config = Continuations(exits=EXITS, prompt_tokens=PROMPT, new_tokens=NEW)
    return record_continuations(engine, documents, config)


@pytest.mark.parametrize("salt", range(6))
def test_engine_and_environment_do_the_same(
    salt: int,
    engine: AdaptiveEngine,
    documents: list[tuple[Document, list[int]]],
    traces: TokenTraces,
) -> None:
    sampling = SamplingParams(max_tokens=NEW + 1, ignore_eos=True)
    for document, prompt in documents:
        live, offline = Script(salt), Script(salt)
        [done] = engine.generate([prompt], sampling, live, kv_mode="verify")
        mine = traces.select([document.digest])
        costs = replace(measured(engine.model_fingerprint), layers=engine.stack.layers)
        counts = replay_drafts(offline, mine, costs, PENDING).counts
        assert counts["tokens"] == len(done.token_ids) - 1 == NEW
        assert counts["layer_calls"] == done.stats.layer_calls
        assert counts["drafts"] == done.stats.drafts
        assert counts["accepted"] == done.stats.drafts_accepted
        assert counts["cycles"] == NEW - done.stats.drafts_accepted
        np.testing.assert_allclose(live.outlooks, offline.outlooks, atol=1e-6)
        np.testing.assert_allclose(live.fresh, offline.fresh, rtol=1e-4, atol=1e-6)
        assert 0 < done.stats.drafts_accepted < done.stats.drafts  # else nothing is compared
