"""A policy may observe the hidden state itself. Shape suffixes: N rows, D width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray, hidden_schema, schema_of
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine
from offramp.worker.probes import ProbeInputs, Readout, make_probe
from offramp.worker.recording.recorder import record_document
from support.models import VOCAB, make_model

EXITS = (1, 3)


class WatchingMlp(MlpPolicy):
    """Never leaves; keeps every state it was shown."""

    def __init__(self, width: int) -> None:
        super().__init__(EXITS, hidden_schema(width), _weights(width), threshold=1e9)
        self.seen: list[FloatArray] = []

    def leave(self, features_NF: FloatArray) -> np.ndarray:
        self.seen.append(features_NF.copy())
        return super().leave(features_NF)


def _weights(width: int) -> list[tuple[FloatArray, FloatArray]]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(width, 1)).astype(np.float32), np.zeros(1, np.float32))]


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"))


def test_live_states_are_the_recorded_ones(engine: AdaptiveEngine) -> None:
    tokens = np.random.default_rng(1).integers(1, 20, size=30).tolist()
    table_VK = np.tile(np.arange(8, dtype=np.int32), (VOCAB, 1))
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK, states=True)
    watcher = WatchingMlp(engine.stack.width)
    engine.submit(tokens[:1], policy=watcher, forced=tokens[1:])
    while engine.load != (0, 0):
        engine.step()
    live = np.concatenate(watcher.seen).reshape(-1, len(EXITS), engine.stack.width)
    assert chunk.state_TED is not None
    recorded = chunk.state_TED[1 : 1 + len(live)].astype(np.float32)
    np.testing.assert_allclose(recorded, live, rtol=2e-3, atol=2e-3)
    assert len(live) == len(tokens) - 2


def test_an_agent_on_states_comes_back_from_a_bundle() -> None:
    policy = MlpPolicy(EXITS, hidden_schema(48), _weights(48))
    canned_NF = np.random.default_rng(2).normal(size=(32, 48)).astype(np.float32)
    packed = pack_policy(policy, canned_NF)
    draft = PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
    assert draft.policy().schema is hidden_schema(48)
    assert schema_of(hidden_schema(48).digest, 47) is None


def test_states_of_another_width_are_not_probed(engine: AdaptiveEngine) -> None:
    x_ND = torch.zeros(1, engine.stack.width)
    inputs = ProbeInputs(Readout(engine.stack), x_ND, np.zeros(1, np.int32), 2)
    found = make_probe(hidden_schema(engine.stack.width), inputs).features(1, x_ND + 1)
    np.testing.assert_array_equal(found, np.ones((1, engine.stack.width), np.float32))
    with pytest.raises(ConfigError, match="another width"):
        make_probe(hidden_schema(engine.stack.width + 1), inputs)
