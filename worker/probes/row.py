"""CANDIDATES_V1 of one row: built with its request, begun anew with every token.

Shape suffixes: K candidates, D width, V vocabulary, F features; 1 the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import Policy
from offramp.worker.candidates import NgramIndex
from offramp.worker.probes.kernel import BEST
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.row_kernel import begin_row, row_features, row_logit


class RowProbe:
    """What ``CandidateProbe`` computes, for the only row of a wave: no array is made per token.

    Args:
        readout: Of a model on the host, which shows its norm and head.
        policy: The row's, with a candidate table.
        ngrams: The row's index.
    """

    def __init__(self, readout: Readout, policy: Policy, ngrams: NgramIndex) -> None:
        table_VK, norm, stack = policy.candidates_VK, readout.norm, readout.stack
        assert table_VK is not None
        assert norm is not None
        assert readout.head_VD is not None
        self._table_VK, self._ngrams = table_VK, ngrams
        self._layers, self._context = stack.layers, stack.context
        self._exits = len(policy.exits)
        candidates_1K = np.empty((1, table_VK.shape[1]), np.int32)
        last_1D, memory_14 = np.empty((1, stack.width), np.float32), np.empty((1, 4), np.float32)
        self._place_1 = np.empty(1, np.float32)
        # The compiled calls' arguments that never change, before and after the state.
        self._scored = (readout.head_VD, candidates_1K)
        self._read = (readout.norm_2D, norm.eps, norm.is_centred, last_1D, memory_14, self._place_1)
        self._memory = (candidates_1K, last_1D, memory_14)
        self._bits = (readout.head_VD.dtype == np.uint16, stack.dtype is torch.bfloat16)
        self.policy: MlpPolicy | None = policy if type(policy) is MlpPolicy else None
        """Whose ``logit`` it computes; None if the policy is of another kind."""

    def begin(self, drafted: Sequence[int], x_1D: Tensor, position: int) -> None:
        """A token begins.

        Args:
            drafted: The row's tokens that its index does not know.
            x_1D: The token's embedding.
            position: The token's.
        """
        last, followers = self._ngrams.followers(drafted)
        own_J = np.array(followers, np.int32)
        begin_row(self._table_VK, last, own_J, _address(x_1D), self._bits[1], *self._memory)
        self._place_1[0] = position / self._context

    def compile(self, x_1D: Tensor) -> None:
        """Call what is compiled once, with any state."""
        self.begin((), x_1D, 0)
        self.features(1, x_1D)
        if self.policy is not None:
            self.logit(1, x_1D)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [1, F]."""
        features_1F: FloatArray = row_features(*self._arguments(layer, x_ND))
        return features_1F

    def logit(self, layer: int, x_11D: Tensor) -> float:
        """What the policy makes of the columns, in one compiled call.

        Returns:
            NaN if the columns are not finite, or the logit is not.
        """
        assert self.policy is not None
        flat, sizes = self.policy.flat, self.policy.sizes
        return float(row_logit(*self._arguments(layer, x_11D), flat, sizes))

    def _arguments(self, layer: int, x: Tensor) -> tuple[Any, ...]:
        depth = layer / self._layers
        return (*self._scored, _address(x), *self._read, depth, self._exits, self._bits)

    def best_N(self) -> IntArray:
        """The best candidate, [1]."""
        best: IntArray = self._memory[0][0, int(self._memory[2][0, BEST])][None]
        return best

    def keep(self, stay_N: BoolArray) -> None:
        """Nothing to forget: a row that leaves begins its next token anew."""

    def logits(self) -> Tensor | None:
        """None were computed."""
        return None


def _address(x: Tensor) -> int:
    """Of a row's numbers, which are neighbours, as every layer and embedding leaves them."""
    assert x.stride(-1) == 1
    return x.data_ptr()
