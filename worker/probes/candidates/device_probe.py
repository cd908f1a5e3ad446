"""CANDIDATES_V1 and an MLP's decision on the model's device: of a decision one transfer comes back.

Shape suffixes: N rows, F features, H hidden units, I inputs of a layer, O its outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.controller.policies.mlp import MlpPolicy
from offramp.worker.model.transfers import fetch, upload
from offramp.worker.probes.candidates.candidate_probe import CandidateProbe
from offramp.worker.probes.candidates.scorers import DeviceScorer
from offramp.worker.probes.probe import ProbeInputs
from offramp.worker.probes.readout import Readout

STAYS, LEAVES, FAILS = range(3)
"""What is decided about a row; it fails if its features or logit are not finite."""


class DeviceNet(NamedTuple):
    """A tanh MLP with one output on the device; one per policy.

    Attributes:
        weights_IO, biases_O: Weight and bias of each layer, float32.
    """

    weights_IO: tuple[Tensor, ...]
    biases_O: tuple[Tensor, ...]

    @classmethod
    def of(cls, readout: Readout, policy: MlpPolicy) -> DeviceNet:
        """Copy a policy's weights to the model's device."""
        device = readout.stack.device
        weights, biases = zip(*policy.weights, strict=True)
        return cls(
            tuple(upload(weight_IO, device, torch.float32) for weight_IO in weights),
            tuple(upload(bias_O, device, torch.float32) for bias_O in biases),
        )

    def decide(self, features_NF: Tensor, threshold: float) -> Tensor:
        """STAYS, LEAVES or FAILS for each row, [N] uint8, as ``MlpPolicy`` and its guard decide."""
        x_NH = features_NF
        for weight_IO, bias_O in zip(self.weights_IO[:-1], self.biases_O[:-1], strict=True):
            x_NH = torch.addmm(bias_O, x_NH, weight_IO).tanh()
        logit_N = torch.addmm(self.biases_O[-1], x_NH, self.weights_IO[-1])[:, 0]
        # tanh would hide infinite features.
        is_finite_N = features_NF.square().sum(-1).isfinite() & logit_N.isfinite()
        return torch.where(is_finite_N, (logit_N > threshold).to(torch.uint8), FAILS)


class DeviceProbe(CandidateProbe):
    """What ``FusedProbe`` is on the host: probe and policy as one step of the device.

    Args:
        inputs: What the rows offer; with candidates.
        policy: Decides who leaves.
    """

    def __init__(self, inputs: ProbeInputs, policy: MlpPolicy) -> None:
        assert inputs.candidates_NK is not None  # admission asks for the table
        stack = inputs.readout.stack
        place_N = (inputs.positions_N / stack.context).astype(np.float32)
        scorer = DeviceScorer(
            inputs.readout, inputs.candidates_NK, inputs.x_ND, place_N, inputs.exits
        )
        super().__init__(stack.layers, scorer)
        self.policy: MlpPolicy | None = policy
        self._net = inputs.readout.derived(DeviceNet.of, policy)

    def leaving(self, layer: int, x_N1D: Tensor) -> tuple[list[int], list[int]]:
        """Ask the policy about all rows, as ``Decider`` says; one transfer comes back."""
        assert isinstance(self._scorer, DeviceScorer)
        features_NF = self._scorer.columns(layer / self._layers, x_N1D[:, 0])
        assert self.policy is not None
        decided_N = fetch(self._net.decide(features_NF, float(self.policy.threshold)))[0].numpy()
        if decided_N.any():
            self.keep(decided_N == STAYS)
        leaving, failed = (np.flatnonzero(decided_N == code) for code in (LEAVES, FAILS))
        return leaving.tolist(), failed.tolist()
