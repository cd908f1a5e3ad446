"""SOFTMAX_V2: confidence over the full vocabulary.

Shape suffixes: N rows, D width, V vocabulary, S = 3 softmax columns, F features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import SOFTMAX_V2, BoolArray, FloatArray, IntArray
from offramp.controller.traces import SOFTMAX_COLUMNS
from offramp.worker.model.transfers import fetch
from offramp.worker.probes.probe import ProbeInputs


class SoftmaxProbe:
    """SOFTMAX_V2, at the price of one LM head per probe.

    The head of the probe at which a row leaves is the one its token is drawn from.

    Args:
        inputs: What the rows offer; the candidates are not read.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        self._stack = inputs.readout.stack
        self._exits = inputs.exits
        self._position_N = inputs.positions_N / self._stack.context
        self._best_N = np.full(len(inputs.x_ND), -1, np.int32)
        self._run_N = np.zeros(len(inputs.x_ND), np.float32)
        self._logits_NV: Tensor | None = None

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of SOFTMAX_V2, [N, F]."""
        self._logits_NV = self._stack.logits(x_ND)
        alone = len(x_ND) == 1 and x_ND.device.type == "cpu"
        sure_NS, best_N = (one_row if alone else softmax_features)(self._logits_NV)
        agrees_N = best_N == self._best_N
        self._run_N = np.where(agrees_N, self._run_N + 1, 0)
        self._best_N = best_N
        out_NF = np.empty((len(best_N), SOFTMAX_V2.width), np.float32)
        out_NF[:, :3] = sure_NS
        out_NF[:, 3] = agrees_N
        out_NF[:, 4] = self._run_N / self._exits
        out_NF[:, 5] = layer / self._stack.layers
        out_NF[:, 6] = self._position_N
        return out_NF

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._best_N = self._best_N[stay_N]
        self._run_N = self._run_N[stay_N]
        self._position_N = self._position_N[stay_N]

    def logits(self) -> Tensor | None:
        """Give the logits of the last probe, [N, V]."""
        return self._logits_NV


def softmax_features(logits_NV: Tensor) -> tuple[FloatArray, IntArray]:
    """SOFTMAX_COLUMNS of whole logits [N, 3], and the best token [N]."""
    chances_NV = logits_NV.float().softmax(-1)
    best_N2 = chances_NV.topk(2, dim=-1)
    # entr(0) is 0, where p · ln p would be NaN.
    entropy_N = torch.special.entr(chances_NV).sum(-1) / math.log(logits_NV.shape[-1])
    top1_N, second_N = best_N2.values.unbind(-1)
    sure_NS = torch.stack((top1_N, top1_N - second_N, entropy_N), dim=-1)
    assert sure_NS.shape[1] == len(SOFTMAX_COLUMNS)
    sure_NS, best_N = fetch(sure_NS, best_N2.indices[:, 0].to(torch.int32))
    return sure_NS.numpy(), best_N.numpy()


def one_row(logits_1V: Tensor) -> tuple[FloatArray, IntArray]:
    """Compute one row on the host: in numpy, since dispatch is what a lone row pays for."""
    logits_V = logits_1V[0].float().numpy()
    best = int(logits_V.argmax())
    shifted_V = logits_V - logits_V[best]
    weights_V = np.exp(shifted_V)
    total = float(weights_V.sum())
    entropy = (math.log(total) - float(weights_V.dot(shifted_V)) / total) / math.log(len(logits_V))
    weights_V[best] = 0.0
    margin = (1.0 - float(weights_V.max())) / total
    return np.array([[1.0 / total, margin, entropy]], np.float32), np.array([best], np.int32)
