"""CANDIDATES_V1: scores of a few likely tokens, without the LM head.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1, BoolArray, FloatArray, IntArray
from offramp.worker.probes.base import ProbeInputs
from offramp.worker.probes.confidence import Confidence
from offramp.worker.probes.motion import motion_one, motion_rows
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.scorers import make_scorer
from offramp.worker.stack import LayerStack


class CandidateProbe:
    """CANDIDATES_V1: scores of K candidate tokens, and how the hidden state moved.

    The candidates' rows of the head are gathered once per token.

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
        rows, scored = candidates_NK.shape
        self._layers = stack.layers
        self._scorer = make_scorer(readout or Readout(stack), candidates_NK, x_ND)
        self._confidence = Confidence(rows, scored, exits)
        self._context = stack.context
        self._positions_N = positions_N

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
        scores_NK, *products = self._scorer.score(x_ND)
        if len(scores_NK) == 1:
            return self._one(layer, scores_NK[0], *(float(each_N[0]) for each_N in products))
        out = np.empty((len(scores_NK), CANDIDATES_V1.width), np.float32)
        out[:, :4], out[:, 6:9] = self._confidence.rows(scores_NK)
        out[:, 4:6] = motion_rows(*products)
        out[:, 9] = layer / self._layers
        out[:, 10] = self._positions_N / self._context
        return out

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._scorer.keep(stay_N)
        self._confidence.keep(stay_N)
        self._positions_N = self._positions_N[stay_N]

    def logits(self) -> Tensor | None:
        """None were computed: that is the point of candidates."""
        return None

    def _one(self, layer: int, scores_K: FloatArray, *products: float) -> FloatArray:
        """The only row, in scalars: a third of the time that columns take for it."""
        sure, since = self._confidence.one(scores_K)
        moved = motion_one(*products)
        place = (layer / self._layers, int(self._positions_N[0]) / self._context)
        return np.array([(*sure, *moved, *since, *place)], np.float32)
