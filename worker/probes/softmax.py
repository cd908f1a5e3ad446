"""SOFTMAX_V2: confidence over the full vocabulary.

Shape suffixes: N rows, D width, V vocabulary, S = 3 softmax columns, F features.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import SOFTMAX_V2, BoolArray, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.traces import SOFTMAX_COLUMNS
from offramp.worker.model.transfers import fetch
from offramp.worker.probes.probe import ProbeInputs, part_of

EVERY_ROW = slice(None)


class SoftmaxMemory:
    """Turns whole logits of some rows, exit by exit, into SOFTMAX_V2.

    Args:
        exits: Number of exits that are asked at.
        layers: Number of layers of the model.
        position_N: Position of each row's last token, as a share of the context.

    Attributes:
        best_N: Each row's best token when it was last seen, [N]; −1 before.
    """

    def __init__(self, exits: int, layers: int, position_N: FloatArray) -> None:
        self._exits, self._layers = exits, layers
        self._position_N = position_N
        self.best_N = np.full(len(position_N), -1, np.int32)
        self._run_N = np.zeros(len(position_N), np.float32)

    def features(
        self, layer: int, logits_MV: Tensor, rows: IndexArray | slice = EVERY_ROW
    ) -> FloatArray:
        """All columns of SOFTMAX_V2, [M, F], of all rows or of some, whose logits these are."""
        alone = len(logits_MV) == 1 and logits_MV.device.type == "cpu"
        sure_MS, best_M = (one_row if alone else softmax_features)(logits_MV)
        agrees_M = best_M == self.best_N[rows]
        run_M = np.where(agrees_M, self._run_N[rows] + 1, 0)
        self.best_N[rows], self._run_N[rows] = best_M, run_M
        out_MF = np.empty((len(best_M), SOFTMAX_V2.width), np.float32)
        out_MF[:, :3] = sure_MS
        out_MF[:, 3] = agrees_M
        out_MF[:, 4] = run_M / self._exits
        out_MF[:, 5] = layer / self._layers
        out_MF[:, 6] = self._position_N[rows]
        return out_MF

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self.best_N = self.best_N[stay_N]
        self._run_N = self._run_N[stay_N]
        self._position_N = self._position_N[stay_N]


class SoftmaxProbe:
    """SOFTMAX_V2, at the price of one LM head per probe.

    The head of the probe at which a row leaves is the one its token is drawn from. Where that takes
    noise, it is the scores with their noise that say how sure the draw is, and so they are what
    the columns are of.

    Args:
        inputs: What the rows offer; the candidates are not read.

    Attributes:
        scores: How each row's next token is drawn, as in ``inputs``; [] if no noise is.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        self._stack = inputs.readout.stack
        position_N = (inputs.positions_N / self._stack.context).astype(np.float32)
        self._memory = SoftmaxMemory(inputs.exits, self._stack.layers, position_N)
        self.scores = list(inputs.scores) if any(inputs.scores) else []
        self._logits_NV: Tensor | None = None

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of SOFTMAX_V2, [N, F]."""
        self._logits_NV = seen_NV = self._stack.logits(x_ND)
        if self.scores:
            rows = zip(self.scores, seen_NV, strict=True)
            seen_NV = torch.stack(
                [each(row_V) if each else row_V.cpu().float() for each, row_V in rows]
            )
        return self._memory.features(layer, seen_NV)

    def best_N(self) -> IntArray:
        """Give the token of each row that the last ``features`` found best, [N]."""
        return self._memory.best_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left, which a copy made before goes on to remember."""
        self._memory = part_of(self._memory, stay_N)
        self.scores = list(itertools.compress(self.scores, stay_N))

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
