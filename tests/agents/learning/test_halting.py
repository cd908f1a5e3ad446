"""PALBERT's halting distribution against its closed form, and the exits that q takes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offramp.agents.learning.halting import HaltingConfig, geometric, halting, train_halting
from offramp.agents.learning.phat import logit
from offramp.agents.placing.replay import walk
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.envs import TokenTraces

CONFIG = HaltingConfig(epochs=30, prior=0.4, weight=0.2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def policy_of(traces: TokenTraces, config: HaltingConfig) -> MlpPolicy:
    return MlpPolicy(traces.header.exits, CANDIDATES_V1, train_halting(traces, config))


def test_where_only_depth_is_seen_it_is_the_closed_form(deep_data: TrainingData) -> None:
    """With the error r(e) of each exit, the least of E[r] + β·KL(p ‖ prior) is prior·exp(−r/β)."""
    traces = deep_data.train
    features_NEF = np.zeros_like(traces.features_NEF)
    features_NEF[:, :, CANDIDATES_V1.index("depth")] = np.array(traces.header.exits) / 8
    blind = replace(traces, features_NEF=features_NEF)
    error_E1 = 1 - blind.quality("label").mean(0)
    wanted_E1 = geometric(3, CONFIG.prior) * np.exp(-error_E1 / CONFIG.weight)
    policy = policy_of(blind, CONFIG)
    found_E1 = halting(torch.from_numpy(policy.logits(features_NEF[0]).copy())[None])[0]
    assert len(set(error_E1.tolist())) == 4
    np.testing.assert_allclose(found_E1, wanted_E1 / wanted_E1.sum(), atol=0.02)


def test_q_takes_the_first_exit_by_which_so_much_has_halted(deep_data: TrainingData) -> None:
    traces = deep_data.validation
    net = policy_of(deep_data.train, CONFIG)
    by_exit = [net.logits(traces.features_NEF[:512, place]).copy() for place in range(3)]
    chances_NE1 = halting(torch.from_numpy(np.stack(by_exit, axis=1))).numpy()
    for q in np.quantile(chances_NE1[:, :-1].sum(1), (0.2, 0.4, 0.6)).tolist():
        wanted = []
        for chances in chances_NE1.tolist():
            halted, here = chances[0], 0
            while halted < q:
                here += 1
                halted += chances[here]
            wanted.append(here)
        taken_N = walk(net.at(logit(q)), traces).taken_N[:512]
        # A sum in float32 may stand on the other side of q.
        assert np.mean(taken_N == wanted) > 0.99
        assert len(set(taken_N.tolist())) > 2


def test_a_surer_q_leaves_later_and_is_more_often_right(deep_data: TrainingData) -> None:
    traces = deep_data.validation
    net = policy_of(deep_data.train, CONFIG)
    walks = [walk(net.at(logit(q)), traces) for q in (0.2, 0.5, 0.95)]
    assert np.diff([each.taken_N.mean() for each in walks]).min() > 0
    assert np.diff([each.quality_N(traces, "label").mean() for each in walks]).min() > 0


def test_a_prior_that_is_no_chance_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1.0 is not in \(0, 1\)"):
        HaltingConfig(prior=1.0)
