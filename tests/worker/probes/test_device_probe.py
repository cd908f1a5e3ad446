"""Probes that compute in torch, where the model lies, agree with those of the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1, STATE_V1, IntArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.worker.model.families import stack_for
from offramp.worker.probes import CandidateProbe, DeviceProbe, ProbeInputs, Readout, StateProbe
from offramp.worker.probes.candidates.device_probe import FAILS, LEAVES, STAYS, DeviceNet
from offramp.worker.probes.state import DeviceStateProbe
from offramp.worker.profiling.samples import random_policy
from support.models import VOCAB, make_model

ROWS, EXITS = 6, (1, 2, 4)


@pytest.fixture(scope="module")
def readout() -> Readout:
    return Readout(stack_for(make_model("llama")))


@pytest.fixture(scope="module")
def states() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(ROWS, 48, generator=generator) for _ in range(4)]


@pytest.fixture(scope="module")
def table_VK() -> IntArray:
    return np.argsort(np.random.default_rng(3).random((VOCAB, VOCAB)))[:, :8].astype(np.int32)


def inputs(readout: Readout, table_VK: IntArray, x_ND: Tensor) -> ProbeInputs:
    positions_N = np.arange(10, 10 + ROWS, dtype=np.int32)
    return ProbeInputs(readout, x_ND, positions_N, len(EXITS), table_VK[:ROWS], table_VK)


def middling(readout: Readout, table_VK: IntArray, states: list[Tensor]) -> MlpPolicy:
    """A policy that at the first exit lets half of the rows leave."""
    policy = random_policy(CANDIDATES_V1, EXITS, table_VK)
    probe = CandidateProbe.of(inputs(readout, table_VK, states[0]))
    policy.threshold = float(np.median(policy.logits(probe.features(1, states[1]))))
    return policy


def test_an_mlp_lets_the_same_rows_leave_exit_after_exit(
    readout: Readout, table_VK: IntArray, states: list[Tensor]
) -> None:
    policy = middling(readout, table_VK, states)
    device = DeviceProbe(inputs(readout, table_VK, states[0]), policy)
    host = CandidateProbe.of(inputs(readout, table_VK, states[0]))
    here = np.arange(ROWS)
    gone = []
    for layer, x_ND in zip(EXITS, states[1:], strict=True):
        leave_N = policy.leave(host.features(layer, x_ND[here])).copy()
        leaving, failed = device.leaving(layer, x_ND[here][:, None])
        assert leaving == np.flatnonzero(leave_N).tolist()
        assert failed == []
        host.keep(~leave_N)
        gone.append(len(leaving))
        here = here[~leave_N]
    assert gone[0] == ROWS // 2
    assert len(here) + sum(gone) == ROWS


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_whose_features_are_not_finite_fails_alone(
    readout: Readout, table_VK: IntArray, states: list[Tensor], value: float
) -> None:
    policy = middling(readout, table_VK, states)
    clean = DeviceProbe(inputs(readout, table_VK, states[0]), policy)
    expected, _ = clean.leaving(1, states[1][:, None])
    spoiled_ND = states[1].clone()
    spoiled_ND[2, 5] = value
    probe = DeviceProbe(inputs(readout, table_VK, states[0]), policy)
    leaving, failed = probe.leaving(1, spoiled_ND[:, None])
    assert failed == [2]
    assert leaving == [n for n in expected if n != 2]
    assert len(probe.features(2, states[2][: ROWS - len({*leaving, 2})])) == ROWS - len(leaving) - 1


def test_what_tanh_would_hide_fails(readout: Readout, table_VK: IntArray) -> None:
    policy = random_policy(CANDIDATES_V1, EXITS, table_VK)
    net = DeviceNet.of(readout, policy)
    features_NF = torch.zeros(4, CANDIDATES_V1.width)
    features_NF[1, 3], features_NF[2, 3] = float("inf"), float("nan")
    # Of zero features and biases the logit is 0.
    assert net.decide(features_NF, -1.0).tolist() == [LEAVES, FAILS, FAILS, LEAVES]
    assert net.decide(features_NF, 0.0).tolist() == [STAYS, FAILS, FAILS, STAYS]
    assert net.decide(features_NF, float("inf")).tolist() == [STAYS, FAILS, FAILS, STAYS]


def test_state_features_are_those_of_the_host(
    readout: Readout, table_VK: IntArray, states: list[Tensor]
) -> None:
    probes: list[Any] = [
        kind(inputs(readout, table_VK, states[0])) for kind in (StateProbe, DeviceStateProbe)
    ]
    here = np.arange(ROWS)
    for layer, x_ND in zip(EXITS, states[1:], strict=True):
        host, device = (probe.features(layer, x_ND[here]) for probe in probes)
        assert device.shape == (len(here), STATE_V1.width)
        np.testing.assert_allclose(host, device, rtol=1e-4, atol=1e-5)
        stay_N = np.arange(len(here)) != 1
        for probe in probes:
            probe.keep(stay_N)
        here = here[stay_N]
