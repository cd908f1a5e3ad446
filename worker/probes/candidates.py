"""CANDIDATES_V1: scores of a few likely tokens, without the LM head.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.worker.probes.base import ProbeInputs
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.scorers import make_scorer
from offramp.worker.stack import LayerStack


class CandidateProbe:
    """CANDIDATES_V1: scores of K candidate tokens, and how the hidden state moved.

    Args:
        stack: The model.
        candidates_NK: Candidate tokens per row, distinct within a row.
        x_ND: The rows' embeddings: what the first probe is compared to.
        positions_N: Token positions.
        exits: Number of exits the policy may ask at.
        readout: The model's norm and head, if the caller has one; else one is made.
    """

    def __init__(
        self,
        stack: LayerStack,
        candidates_NK: IntArray,
        x_ND: Tensor,
        positions_N: IntArray,
        exits: int,
        readout: Readout | None = None,
    ) -> None:
        self._layers = stack.layers
        place_N = (positions_N / stack.context).astype(np.float32)
        readout = readout or Readout(stack)
        self._scorer = make_scorer(readout, candidates_NK, x_ND, place_N, exits)

    @classmethod
    def of(cls, inputs: ProbeInputs) -> CandidateProbe:
        """The registry's factory."""
        assert inputs.candidates_NK is not None  # admission asks for the table
        return cls(
            inputs.readout.stack,
            inputs.candidates_NK,
            inputs.x_ND,
            inputs.positions_N,
            inputs.exits,
            inputs.readout,
        )

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [N, F]."""
        return self._scorer.features(layer / self._layers, x_ND)

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._scorer.keep(stay_N)

    def logits(self) -> Tensor | None:
        """None were computed: that is the point of candidates."""
        return None
