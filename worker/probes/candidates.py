"""CANDIDATES_V1: scores of a few likely tokens, without the LM head.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import Policy
from offramp.worker.candidates import NgramIndex
from offramp.worker.probes.base import ProbeInputs
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.scorers import HostScorer, Scorer, make_scorer


class CandidateProbe:
    """CANDIDATES_V1: scores of K candidate tokens, and how the hidden state moved.

    Args:
        layers: Number of layers of the model.
        scorer: Computes the columns.
    """

    def __init__(self, layers: int, scorer: Scorer) -> None:
        self._layers = layers
        self._scorer = scorer
        self.is_compiled = isinstance(scorer, HostScorer)
        """Whether it has ``logit``."""

    @classmethod
    def of(cls, inputs: ProbeInputs) -> CandidateProbe:
        """The registry's factory."""
        assert inputs.candidates_NK is not None  # admission asks for the table
        stack = inputs.readout.stack
        place_N = (inputs.positions_N / stack.context).astype(np.float32)
        scorer = make_scorer(
            inputs.readout, inputs.candidates_NK, inputs.x_ND, place_N, inputs.exits
        )
        return cls(stack.layers, scorer)

    @classmethod
    def of_row(
        cls,
        readout: Readout,
        policy: Policy,
        ngrams: NgramIndex,
        drafted: Sequence[int],
        x_1D: Tensor,
        position: int,
    ) -> CandidateProbe:
        """The same for one row, in fewer steps; the readout shows its norm and head."""
        assert policy.candidates_VK is not None
        stack, exits = readout.stack, len(policy.exits)
        place = position / stack.context
        scorer = HostScorer.of_row(
            readout, policy.candidates_VK, ngrams, drafted, x_1D, place, exits
        )
        return cls(stack.layers, scorer)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [N, F]."""
        return self._scorer.features(layer / self._layers, x_ND)

    def logit(self, layer: int, x_1D: Tensor, policy: MlpPolicy) -> float:
        """What a policy makes of the only row's columns, in one compiled call.

        Returns:
            NaN if the columns are not finite, or the logit is not.
        """
        assert isinstance(self._scorer, HostScorer)
        return self._scorer.logit(layer / self._layers, x_1D, policy)

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._scorer.keep(stay_N)

    def logits(self) -> Tensor | None:
        """None were computed: that is the point of candidates."""
        return None
