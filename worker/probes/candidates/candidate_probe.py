"""CANDIDATES_V1: scores of a few likely tokens, without the LM head.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.worker.probes.candidates.scorers import Scorer, make_scorer
from offramp.worker.probes.probe import ProbeInputs, part_of


class CandidateProbe:
    """CANDIDATES_V1: scores of K candidate tokens, and how the hidden state moved.

    Args:
        layers: Number of layers of the model.
        scorer: Computes the columns.
    """

    def __init__(self, layers: int, scorer: Scorer) -> None:
        self._layers = layers
        self._scorer = scorer

    @classmethod
    def of(cls, inputs: ProbeInputs) -> CandidateProbe:
        """Make the probe from what every probe is made from."""
        assert inputs.candidates_NK is not None  # admission asks for the table
        stack = inputs.readout.stack
        place_N = (inputs.positions_N / stack.context).astype(np.float32)
        scorer = make_scorer(
            inputs.readout, inputs.candidates_NK, inputs.x_ND, place_N, inputs.exits
        )
        return cls(stack.layers, scorer)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [N, F]."""
        return self._scorer.features(layer / self._layers, x_ND)

    def best_N(self) -> IntArray:
        """The best candidate of each row, [N]."""
        return self._scorer.best_N()

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._scorer = part_of(self._scorer, stay_N)

    def logits(self) -> Tensor | None:
        """None were computed: that is the point of candidates."""
        return None
