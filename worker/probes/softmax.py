"""SOFTMAX_V1: full-vocabulary confidence.

Shape suffixes: N rows, D width, V vocabulary, F features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from offramp.controller.features import SOFTMAX_V1, BoolArray, FloatArray
from offramp.worker.probes.base import ProbeInputs
from offramp.worker.stack import LayerStack


class SoftmaxProbe:
    """SOFTMAX_V1, at the price of one LM head per probe.

    The head of the probe at which a row leaves is the one its token is drawn from.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self._logits_NV: Tensor | None = None

    @classmethod
    def of(cls, inputs: ProbeInputs) -> SoftmaxProbe:
        """The registry's factory."""
        return cls(inputs.readout.stack)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """Probability of the best token, and its margin over the second, [N, 2]."""
        self._logits_NV = self.stack.logits(x_ND)
        return softmax_features(self._logits_NV)

    def keep(self, stay_N: BoolArray) -> None:
        """Nothing is remembered."""

    def logits(self) -> Tensor | None:
        """Those of the last probe."""
        return self._logits_NV


def softmax_features(logits_NV: Tensor) -> FloatArray:
    """SOFTMAX_V1 from whole logits, [N, 2]."""
    best_N2 = logits_NV.float().softmax(-1).topk(2, dim=-1).values.cpu().numpy()
    features_NF = np.empty((len(best_N2), SOFTMAX_V1.width), np.float32)
    features_NF[:, 0] = best_N2[:, 0]
    features_NF[:, 1] = best_N2[:, 0] - best_N2[:, 1]
    return features_NF
