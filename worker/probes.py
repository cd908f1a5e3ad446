"""Probes: what a policy sees of a row at an exit, computed without running the rest of the model.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import (
    CANDIDATES_V1,
    SOFTMAX_V1,
    BoolArray,
    FloatArray,
    IntArray,
)
from offramp.worker.stack import LayerStack

LOGIT_SCALE = 10.0
"""Divides raw candidate scores so that the feature is of order one."""


class Probe(Protocol):
    """Computes one schema's features for a shrinking set of rows, exit by exit."""

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """Features [N, F] of the rows' hidden states after ``layer`` layers."""
        ...

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        ...

    def logits(self) -> Tensor | None:
        """Whole logits [N, V] that the last ``features`` computed anyway; None if it did not."""
        ...


class BlankProbe:
    """For policies that read nothing: features of zero width."""

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """An empty matrix [N, 0]."""
        return np.empty((len(x_ND), 0), np.float32)

    def keep(self, stay_N: BoolArray) -> None:
        """Nothing is remembered."""

    def logits(self) -> Tensor | None:
        """None were computed."""
        return None


class SoftmaxProbe:
    """SOFTMAX_V1: full-vocabulary confidence, at the price of one LM head per probe.

    The head of the probe at which a row leaves is the one its token is drawn from.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self._logits_NV: Tensor | None = None

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


class CandidateProbe:
    """CANDIDATES_V1: scores of K candidate tokens, and how the hidden state moved.

    Args:
        stack: The model.
        candidates_NK: Candidate tokens per row, distinct within a row.
        x_ND: The rows' embeddings: what the first probe is compared to.
        positions_N: Token positions.
        exits: Number of exits the policy may ask at.
    """

    def __init__(
        self,
        stack: LayerStack,
        candidates_NK: IntArray,
        x_ND: Tensor,
        positions_N: IntArray,
        exits: int,
    ) -> None:
        self.stack = stack
        self.exits = exits
        tokens_NK = torch.tensor(candidates_NK, device=stack.device)
        self._rows_NKD = stack.head_rows(tokens_NK)
        self._previous_ND = x_ND.float()
        self._previous_norm_N = torch.linalg.vector_norm(self._previous_ND, dim=-1).cpu().numpy()
        self._position_N = (positions_N / stack.context).astype(np.float32)
        self._best_N = np.full(len(candidates_NK), -1, np.int64)
        self._top1_N = np.zeros(len(candidates_NK), np.float32)
        self._run_N = np.zeros(len(candidates_NK), np.float32)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [N, F]."""
        normed_ND1 = self.stack.norm(x_ND).unsqueeze(-1)
        scores_NK = torch.bmm(self._rows_NKD, normed_ND1).squeeze(-1).float()
        x32_ND = x_ND.float()
        dots_N = torch.linalg.vecdot(x32_ND, self._previous_ND)
        norm_N = torch.linalg.vector_norm(x32_ND, dim=-1)
        # One transfer, so one device synchronisation, per probe.
        packed = torch.cat((scores_NK, dots_N[:, None], norm_N[:, None]), dim=-1).cpu().numpy()
        self._previous_ND = x32_ND
        return self._columns(layer, packed[:, :-2], packed[:, -2], packed[:, -1])

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        stay = torch.from_numpy(stay_N).to(self.stack.device)
        self._rows_NKD = self._rows_NKD[stay]
        self._previous_ND = self._previous_ND[stay]
        for name in ("_previous_norm_N", "_position_N", "_best_N", "_top1_N", "_run_N"):
            setattr(self, name, getattr(self, name)[stay_N])

    def logits(self) -> Tensor | None:
        """None were computed: that is the point of candidates."""
        return None

    def _columns(
        self, layer: int, scores_NK: FloatArray, dots_N: FloatArray, norm_N: FloatArray
    ) -> FloatArray:
        best_N = scores_NK.argmax(-1)
        top_N = scores_NK.max(-1)
        weights_NK = np.exp(scores_NK - top_N[:, None])
        total_N = weights_NK.sum(-1)
        second_N = np.partition(weights_NK, -2, axis=-1)[:, -2]
        top1_N = 1.0 / total_N
        agrees_N = best_N == self._best_N
        first = self._best_N < 0
        self._run_N = np.where(agrees_N, self._run_N + 1, 0).astype(np.float32)
        out = np.empty((len(top_N), CANDIDATES_V1.width), np.float32)
        out[:, 0] = top1_N
        out[:, 1] = (1.0 - second_N) / total_N
        out[:, 2] = _entropy(scores_NK - top_N[:, None], weights_NK, total_N)
        out[:, 3] = top_N / LOGIT_SCALE
        out[:, 4] = dots_N / (norm_N * self._previous_norm_N)
        out[:, 5] = np.log(norm_N / self._previous_norm_N)
        out[:, 6] = agrees_N
        out[:, 7] = self._run_N / self.exits
        out[:, 8] = np.where(first, 0.0, top1_N - self._top1_N)
        out[:, 9] = layer / self.stack.layers
        out[:, 10] = self._position_N
        self._best_N, self._top1_N, self._previous_norm_N = best_N, top1_N, norm_N
        return out


def _entropy(shifted_NK: FloatArray, weights_NK: FloatArray, total_N: FloatArray) -> FloatArray:
    """Entropy of the candidate softmax in units of ln K: (ln Z − Σ w·s / Z) / ln K."""
    mean_N = np.einsum("nk,nk->n", weights_NK, shifted_NK) / total_N
    return np.asarray((np.log(total_N) - mean_N) / np.log(shifted_NK.shape[1]), np.float32)
