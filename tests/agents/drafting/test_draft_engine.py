"""The environment of drafts against the engine: same layers, drafts, cycles, and same views.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from torch import Tensor

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_replay import replay_drafts
from offramp.agents.recording.documents import Document
from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import (
    CANDIDATES_V1,
    SOFTMAX_V2,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.protocols import IndexArray, NeverExit, Seen, is_headless
from offramp.envs import TokenTraces
from offramp.worker import AdaptiveEngine, EngineConfig, Precision, SamplingParams
from offramp.worker.probes.candidates.successors import successor_table
from support.cost_tables import measured
from support.models import LAYERS, VOCAB, make_model, save_adapters

OWN = (1, 2, 4)
MIXED = (Exit(2, "int4"), Exit(LAYERS, "int4"), 1, 3, 4)
PROMPT, NEW, PENDING = 9, 40, 5


@dataclass
class ScriptedDrafts:
    """Goes where a hash of the token's place says, and writes down what it is shown."""

    salt: int
    exits: tuple[int, ...] = OWN
    candidates_VK: IntArray | None = None
    outlooks: list[list[float]] = field(default_factory=list)
    fresh: list[list[float]] = field(default_factory=list)
    seen: list[tuple[int, int, int, FloatArray]] = field(default_factory=list)
    reads_state: bool = True

    @property
    def headless(self) -> bool:
        return self.candidates_VK is not None

    @property
    def schema(self) -> FeatureSchema:
        return CANDIDATES_V1 if self.headless else SOFTMAX_V2

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        self.outlooks += outlook_NC.tolist()
        return np.array([self._draw(row_C, 0, len(self.exits)) for row_C in outlook_NC])

    def route(
        self,
        here: int,
        features_NF: FloatArray,
        outlook_NC: FloatArray,
        *,
        seen: Seen | None = None,
    ) -> IndexArray:
        self.outlooks += outlook_NC.tolist()
        if seen is not None and outlook_NC[0, 2] == 0:
            place = round(float(outlook_NC[0, 0]) * 256) - 1
            self.seen.append((here, place, int(seen.read_N[0]), seen.state_ND[0].copy()))
        if outlook_NC[0, 2] == 0:  # no open draft: surely along the recorded text
            names = SOFTMAX_V2.columns[:-1]  # all but the position
            self.fresh += features_NF[:, [self.schema.index(name) for name in names]].tolist()
        low = [here if self._draw(row_C, 0, 2) else here + 1 for row_C in outlook_NC]
        return np.array([self._draw(r, a, len(self.exits)) for r, a in zip(outlook_NC, low)])  # noqa: B905

    def _draw(self, outlook_C: FloatArray, low: int, high: int) -> int:
        step = round(float(outlook_C[0]) * 256)
        return low + (step * 2654435761 + self.salt * 97 + low * 13) % 1009 % (high - low + 1)


@pytest.fixture(
    scope="module", params=[(OWN, ()), (MIXED, ()), (OWN, (1, 4))], ids=["own", "mixed", "adapted"]
)
def kind(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Exits, and those among them that have an adapter layer."""
    found: tuple[tuple[int, ...], tuple[int, ...]] = request.param
    return found


@pytest.fixture(scope="module")
def exits(kind: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return kind[0]


@pytest.fixture(scope="module")
def engine(
    kind: tuple[tuple[int, ...], tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory
) -> AdaptiveEngine:
    exits, adapted = kind
    if exits == OWN:
        folder = None
        if adapted:
            folder = save_adapters("llama", tmp_path_factory.mktemp("adapters"), adapted)
        config = EngineConfig(max_pending=PENDING, translators=folder)
        return AdaptiveEngine(make_model("llama"), slots=1, config=config)
    config = EngineConfig(max_pending=PENDING, draft_precision=Precision(weights="int4"))
    return AdaptiveEngine(make_model("llama", hidden_size=64), slots=1, config=config)


@pytest.fixture(scope="module")
def documents() -> list[tuple[Document, list[int]]]:
    rng = np.random.default_rng(0)
    texts = [Document.of(f"document {index}", f"{index}.py") for index in range(3)]
    return [(text, rng.integers(1, 90, size=PROMPT).tolist()) for text in texts]


@pytest.fixture(scope="module", params=[False, True], ids=["head", "headless"])
def table_VK(request: pytest.FixtureRequest) -> IntArray | None:
    if not request.param:
        return None
    tokens = np.random.default_rng(1).integers(1, 90, size=2000).tolist()
    return successor_table([tokens], VOCAB, 64)


@pytest.fixture(scope="module")
def traces(
    engine: AdaptiveEngine,
    documents: list[tuple[Document, list[int]]],
    table_VK: IntArray | None,
    exits: tuple[int, ...],
) -> TokenTraces:
    config = Continuations(exits=exits, prompt_tokens=PROMPT, new_tokens=NEW, states=True)
    return record_continuations(engine, documents, config, candidates_VK=table_VK)


@pytest.mark.parametrize("salt", range(6))
def test_engine_and_environment_do_the_same(
    salt: int,
    engine: AdaptiveEngine,
    documents: list[tuple[Document, list[int]]],
    traces: TokenTraces,
    table_VK: IntArray | None,
) -> None:
    sampling = SamplingParams(max_tokens=NEW + 1, ignore_eos=True)
    accepted = drafts = 0
    for document, prompt in documents:
        exits = traces.header.exits
        live, offline = (ScriptedDrafts(salt, exits, table_VK) for _ in range(2))
        [done] = engine.generate([prompt], sampling, live, kv_mode="verify")
        mine = traces.select([document.digest])
        costs = replace(measured(engine.model_fingerprint), layers=engine.stack.layers)
        counts = replay_drafts(offline, mine, costs, PENDING).counts
        assert counts["tokens"] == len(done.token_ids) - 1 == NEW
        assert counts["layer_calls"] == done.stats.layer_calls
        assert counts["copy_calls"] == done.stats.copy_calls
        assert (done.stats.copy_calls > 0) is (exits == MIXED)
        assert counts["drafts"] == done.stats.drafts
        assert counts["accepted"] == done.stats.drafts_accepted
        assert counts["cycles"] == NEW - done.stats.drafts_accepted
        np.testing.assert_allclose(live.outlooks, offline.outlooks, atol=1e-6)
        # The copy's tokens were recorded side by side, which rounds otherwise.
        near = 1e-6 if exits == OWN else 1e-4
        np.testing.assert_allclose(live.fresh, offline.fresh, rtol=1e-4, atol=near)
        assert mine.state_NED is not None
        assert mine.read_N is not None
        for here, place, read, state_D in live.seen:
            assert mine.read_N[place] in (read, -1)
            np.testing.assert_allclose(
                state_D, mine.state_NED[place, here], rtol=5e-3, atol=5e-3 if exits == OWN else 0.02
            )
        accepted, drafts = accepted + done.stats.drafts_accepted, drafts + done.stats.drafts
    assert 0 < accepted < drafts  # else nothing is compared
    assert live.seen


def test_what_is_drafted_without_the_head_is_lossless_and_takes_none(
    engine: AdaptiveEngine,
    documents: list[tuple[Document, list[int]]],
    exits: tuple[int, ...],
    table_VK: IntArray | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads: list[int] = []
    logits = engine.stack.logits

    def counted(x_ND: Tensor) -> Tensor:  # whose head it is makes no difference here
        heads.append(len(x_ND))
        return logits(x_ND)

    copy = engine.decoder.context.copy
    for stack in (engine.stack, *(() if copy is None else (copy.stack,))):
        monkeypatch.setattr(stack, "logits", counted)
    sampling = SamplingParams(max_tokens=NEW + 1, ignore_eos=True)
    prompt = documents[0][1]
    [full] = engine.generate([prompt], sampling, NeverExit())
    heads.clear()
    script = ScriptedDrafts(0, exits, table_VK)
    [done] = engine.generate([prompt], sampling, script, kv_mode="verify")
    assert done.token_ids == full.token_ids
    assert done.stats.drafts > 0
    cycles = NEW - done.stats.drafts_accepted
    # One head in each deep pass, over all that it confirms, and one after the prompt.
    assert (len(heads) == cycles + 1) is script.headless


def test_sampled_requests_draft_from_the_head(
    engine: AdaptiveEngine,
    documents: list[tuple[Document, list[int]]],
    exits: tuple[int, ...],
    table_VK: IntArray | None,
) -> None:
    sampling = SamplingParams(max_tokens=NEW, temperature=1.0, seed=3, ignore_eos=True)
    script = ScriptedDrafts(1, exits, table_VK)
    [done] = engine.generate([documents[0][1]], sampling, script, kv_mode="verify")
    assert len(done.token_ids) == NEW
    assert done.stats.drafts > 0


def test_a_policy_that_drafts_candidates_must_read_them(engine: AdaptiveEngine) -> None:
    policy = ScriptedDrafts(0)
    wrong = type("Wrong", (ScriptedDrafts,), {"headless": True, "schema": SOFTMAX_V2})(0)
    assert not is_headless(policy)
    with pytest.raises(RequestError, match=r"^schema: drafts the best candidate"):
        engine.submit([1], policy=wrong, kv_mode="verify")


def test_head_and_candidates_are_not_mixed(traces: TokenTraces, table_VK: IntArray | None) -> None:
    wrong = ScriptedDrafts(
        0, traces.header.exits, np.zeros((VOCAB, 4), np.int32) if table_VK is None else None
    )
    with pytest.raises(ConfigError, match=r"^traces: "):
        replay_drafts(wrong, traces, measured(traces.header.model), PENDING)
