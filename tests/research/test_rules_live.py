"""Every rule decodes in a real engine: no fault, its own exits, and learners learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from offramp.agents.placing.replay import walk
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, STATE_V1
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.rules.bandit import ThresholdBandit
from offramp.controller.policies.rules.beta import BetaThreshold
from offramp.controller.policies.rules.decay import DecayingThreshold
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.optimal_stopping import StoppingPolicy
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.controller.policies.rules.stages import StageThresholds
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.research.hindsight import plan_of
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.sequence import Sequence as Row
from offramp.worker.recording.recorder import record_document
from support.models import VOCAB, make_model

EXITS = (1, 3)
LAYERS = 5
PROMPT = 4


def stopping() -> StoppingPolicy:
    width = STATE_V1.width
    weights_EP = np.random.default_rng(1).normal(size=(2, 55)).astype(np.float32)
    weights_EP[1, 0] = 100.0  # the constant term: whoever comes to the second exit leaves
    return StoppingPolicy(
        exits=EXITS,
        schema=STATE_V1,
        mean_F=np.zeros(width, np.float32),
        std_F=np.ones(width, np.float32),
        weights_EP=weights_EP,
    )


def rules() -> list[Policy]:
    return [
        DecayingThreshold(exits=EXITS, schema=SOFTMAX_V2, column="top1", threshold=0.05),
        DecayingThreshold(exits=EXITS, schema=STATE_V1, column="cosine", threshold=0.8),
        EntropyExit(exits=EXITS, threshold=0.97),
        PatienceExit(exits=EXITS, patience=1),
        PositionSchedule(exits=EXITS, deepest=LAYERS, shallowest=1),
        StageThresholds(exits=EXITS, schema=SOFTMAX_V2, column="top1", thresholds=(0.06, 0.04)),
        BetaThreshold(
            exits=(3,),
            schema=SOFTMAX_V2,
            column="top1",
            zeta=0.4,
            moments_23=np.zeros((2, 3)),
            fallback=0.03,
        ),
        ThresholdBandit(
            exits=EXITS,
            schema=SOFTMAX_V2,
            column="top1",
            thresholds=(0.03, 0.06),
            trade_off=0.5,
            costs=(0.3, 0.7, 1.0),
        ),
        stopping(),
    ]


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    found: list[int] = np.random.default_rng(3).integers(1, VOCAB, size=48).tolist()
    return found


def decode(engine: AdaptiveEngine, tokens: Sequence[int], policy: Policy, mode: KVMode) -> Row:
    engine.submit(tokens[:PROMPT], policy=policy, forced=tokens[PROMPT:], kv_mode=mode)
    finished: dict[str, Row] = {}
    while not finished:
        engine.step(finished)
    return next(iter(finished.values()))


@pytest.mark.parametrize("mode", ["project", "defer"])
@pytest.mark.parametrize("policy", rules(), ids=lambda policy: type(policy).__name__)
def test_a_rule_decodes_without_a_fault(
    engine: AdaptiveEngine, tokens: list[int], policy: Policy, mode: KVMode
) -> None:
    before = engine.decoder.guard.failures
    row = decode(engine, tokens, policy, mode)
    assert engine.decoder.guard.failures == before
    layers = row.exit_layers[1:]
    assert len(layers) == len(tokens) - PROMPT - 1
    assert set(layers) <= {*policy.exits, LAYERS}
    assert set(layers) & set(policy.exits), "a rule that never leaves would prove nothing"


def test_learners_are_told_by_a_real_engine(engine: AdaptiveEngine, tokens: list[int]) -> None:
    free, bandit = (each for each in rules() if hasattr(each, "learn"))
    assert isinstance(free, BetaThreshold)
    assert isinstance(bandit, ThresholdBandit)
    decode(engine, tokens, free, "defer")
    decode(engine, tokens, bandit, "defer")
    assert free.moments_23[:, 0].sum() > 0
    assert bandit.counts_A.sum() > 0
    decode(engine, tokens, silent := rules()[7], "project")
    assert isinstance(silent, ThresholdBandit)
    assert silent.counts_A.sum() == 0  # projected keys and values are never checked


def test_an_oracle_leaves_where_its_labels_say(engine: AdaptiveEngine, tokens: list[int]) -> None:
    table_VK = np.tile(np.arange(8, dtype=np.int32), (VOCAB, 1))
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK)
    header = TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS)
    traces = TokenTraces.from_chunks(header, [chunk])
    row = decode(engine, tokens, plan_of(traces, PROMPT), "defer")
    taken_N = walk(plan_of(traces), traces).taken_N[PROMPT:]
    planned = np.asarray([*EXITS, LAYERS])[taken_N]
    np.testing.assert_array_equal(row.exit_layers[1:], planned[: len(row.exit_layers) - 1])
