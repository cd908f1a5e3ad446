"""Replay equals a loop over tokens. Shape suffixes: N rows, F features, C outlook columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from offramp.agents.placing.recorded_features import RecordedFeatures, outlook
from offramp.agents.placing.replay import replay, walk
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.errors import ConfigError, PolicyFaultError
from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    SKETCH_V1,
    SOFTMAX_V2,
    BoolArray,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.protocols import (
    FixedExit,
    IndexArray,
    NeverExit,
    ThresholdPolicy,
    Verdict,
)
from offramp.envs import TokenTraces
from support.cost_tables import leaving

EXITS = (2, 4, 6)


@dataclass
class Jumper:
    """Skips the second exit if the first is unsure, gives up if the position is even."""

    exits: tuple[int, ...] = EXITS
    schema: FeatureSchema | None = SOFTMAX_V2
    candidates_VK: IntArray | None = None
    hop: int = 2

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        step_N = outlook_NC[:, OUTLOOK_V1.index("step")] * 256
        return np.where(step_N.round() % 2 == 0, len(self.exits), 0)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        sure_N = features_NF[:, SOFTMAX_V2.index("margin")] > 0.6
        return np.where(sure_N, here, min(here + self.hop, len(self.exits)))


@dataclass
class CountingLearner:
    """Leaves everywhere until a verdict is bad, then never; counts what it was told."""

    exits: tuple[int, ...] = (4,)
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None
    told: list[Verdict] = field(default_factory=list)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return np.full(len(features_NF), all(each.agreed for each in self.told))

    def learn(self, verdicts: list[Verdict]) -> None:
        self.told.extend(verdicts)


def test_full_depth_and_fixed_exits_cost_what_they_say(data: TrainingData) -> None:
    traces, costs = data.validation, data.costs
    full = replay(NeverExit(), traces, costs)
    assert (full.agreement, full.mean_layers, full.cost) == (1.0, 8.0, 1.0)
    fixed = replay(FixedExit(4), traces, costs)
    assert fixed.agreement == pytest.approx(float(traces.agree_NE[:, 1].mean()))
    seconds = 0.1 + 4 * 1.0 + 4 * 0.02 + 0.5 + 0.02  # no probe, but a decision
    assert fixed.cost == pytest.approx(seconds / costs.full_s, rel=1e-6)


def test_a_threshold_costs_what_the_table_says_of_every_exit(data: TrainingData) -> None:
    traces, costs = data.validation, data.costs
    policy = ThresholdPolicy(EXITS, CANDIDATES_V1, "margin", 0.8)
    walked = walk(policy, traces)
    expected = 0.0
    for features_EF in traces.features_NEF:
        taken = next((i for i in range(3) if features_EF[i, 1] >= 0.8), 3)
        expected += float(leaving(costs, EXITS)[taken])
    assert replay(policy, traces, costs).cost == pytest.approx(expected / len(traces), rel=1e-5)
    assert set(walked.taken_N.tolist()) == {0, 1, 2, 3}


def test_jumps_are_walked_as_routed(data: TrainingData) -> None:
    traces = data.validation
    walked = walk(Jumper(), traces)
    step_N = (outlook(traces)[:, OUTLOOK_V1.index("step")] * 256).round().astype(int)
    for row in range(200):
        margin_E = traces.margin_NE[row]
        if step_N[row] % 2 == 0:
            expected = (3, 0)
        elif margin_E[0] > 0.6:
            expected = (0, 1)
        else:
            expected = (2, 2) if margin_E[2] > 0.6 else (3, 2)
        assert (walked.taken_N[row], walked.probes_N[row]) == expected


def test_softmax_features_know_the_last_probe_of_this_policy(data: TrainingData) -> None:
    traces = data.validation
    view = RecordedFeatures(Jumper(exits=(2, 6)), traces)
    rows = np.arange(50)
    first, second = view.features(0, rows), view.features(1, rows)
    assert not first[:, 3].any()
    token_NE = traces.exit_token_NE[:50]
    np.testing.assert_array_equal(second[:, 3], token_NE[:, 2] == token_NE[:, 0])
    np.testing.assert_array_equal(second[:, 4], second[:, 3] / 2)
    np.testing.assert_array_equal(second[:, :3], traces.softmax_NES[:50, 2])


def test_a_learning_policy_is_told_and_left_as_it_was(data: TrainingData) -> None:
    policy = CountingLearner()
    walked = walk(policy, data.validation)
    assert policy.told == []
    # One block of eight tokens leaves; a wrong one among them ends it.
    early = np.flatnonzero(walked.taken_N == 1)
    assert len(early) % 8 == 0
    assert data.validation.agree_NE[early, 1].min() == 0
    assert (walked.taken_N[len(early) :] == 3).all()


def test_outlook_counts_each_document_afresh(data: TrainingData) -> None:
    traces: TokenTraces = data.validation
    outlook_NC = outlook(traces)
    step_N, left_N = outlook_NC[:, 0] * 256, outlook_NC[:, 1] * 256
    for name in range(len(traces.documents)):
        rows = np.flatnonzero(traces.document_N == name)
        np.testing.assert_allclose(step_N[rows], np.arange(len(rows)), atol=1e-3)
        np.testing.assert_allclose(left_N[rows], len(rows) - np.arange(len(rows)), atol=1e-3)


def test_what_was_not_recorded_is_refused(data: TrainingData) -> None:
    with pytest.raises(ConfigError, match=r"\[5\] were not recorded"):
        walk(FixedExit(5), data.validation)
    with pytest.raises(ConfigError, match="'sketch' version 1 was not recorded"):
        walk(ThresholdPolicy((2,), SKETCH_V1, "top1", 0.5), data.validation)
    with pytest.raises(PolicyFaultError, match="from exit 0 to -1"):
        walk(Jumper(hop=-1), data.validation)
