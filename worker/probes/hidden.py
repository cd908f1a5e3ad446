"""The hidden state itself, for agents that observe it.

Shape suffixes: N rows, D width.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray
from offramp.worker.probes.probe import ProbeInputs


class HiddenProbe:
    """``hidden_schema(D)``: the row's state as norm and head read it, copied to the host.

    Args:
        inputs: What the rows offer; only the model's transfer to the host is used.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        self._host = inputs.readout.host

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """The states, [N, D] float32, a copy."""
        return np.array(self._host(x_ND), np.float32)

    def keep(self, stay_N: BoolArray) -> None:
        """Do nothing: nothing is remembered of a row."""

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None
