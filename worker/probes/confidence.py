"""Columns that candidate and sketch probes share: confidence in some scores, and its history.

Each comes twice: for one row in scalars, where a call costs more than its arithmetic, and for many
rows in columns. The two agree (tested).

Shape suffixes: N rows, K scored tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import compress

import numpy as np

from offramp.controller.features import BoolArray, FloatArray
from offramp.worker.probes.candidates.kernel import LOGIT_SCALE

Sure = tuple[float, float, float, float]
"""top1, margin, entropy / ln K, best score / LOGIT_SCALE."""

Since = tuple[float, float, float]
"""agrees, run length / exits, top1 change."""


class Confidence:
    """How sure the scores are, and since when.

    Args:
        rows: Number N of rows.
        scored: Number K of scores of a row.
        exits: Number of exits the policy may ask at.
    """

    def __init__(self, rows: int, scored: int, exits: int) -> None:
        self._log_scored = math.log(scored)
        self._exits = exits
        # Lists: to make, read and write one entry of an array costs more.
        self._best_N, self._top1_N, self._run_N = [-1] * rows, [0.0] * rows, [0.0] * rows
        self._ones_K = _ones(scored)

    @property
    def best_N(self) -> list[int]:
        """Each row's place of the best score; −1 before the first."""
        return self._best_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        stay = stay_N.tolist()
        self._best_N = list(compress(self._best_N, stay))
        self._top1_N = list(compress(self._top1_N, stay))
        self._run_N = list(compress(self._run_N, stay))

    def one(self, scores_K: FloatArray) -> tuple[Sure, Since]:
        """The columns of the only row; its scores are overwritten."""
        best = int(scores_K.argmax())
        top = float(scores_K[best])
        np.subtract(scores_K, top, scores_K)
        weights_K = np.exp(scores_K)
        # Products, not sums: numpy's reductions cost twice as much at this size.
        total = float(weights_K.dot(self._ones_K))
        mean = float(weights_K.dot(scores_K)) / total
        weights_K[best] = 0.0
        second = float(weights_K[weights_K.argmax()])
        top1 = 1.0 / total
        entropy = (math.log(total) - mean) / self._log_scored
        sure = (top1, (1.0 - second) * top1, entropy, top / LOGIT_SCALE)
        return sure, self._since(best, top1)

    def rows(self, scores_NK: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Compute the columns of N rows, [N, 4] and [N, 3]."""
        best_N = scores_NK.argmax(-1)
        top_N = scores_NK.max(-1)
        shifted_NK = scores_NK - top_N[:, None]
        weights_NK = np.exp(shifted_NK)
        total_N = weights_NK.sum(-1)
        mean_N = np.einsum("nk,nk->n", weights_NK, shifted_NK) / total_N
        second_N = np.partition(weights_NK, -2, axis=-1)[:, -2]
        top1_N = 1.0 / total_N
        entropy_N = (np.log(total_N) - mean_N) / self._log_scored
        margin_N = (1.0 - second_N) * top1_N
        sure_N4 = np.stack((top1_N, margin_N, entropy_N, top_N / LOGIT_SCALE), axis=-1)
        return sure_N4, self._since_rows(best_N, top1_N)

    def _since(self, best: int, top1: float) -> Since:
        last = self._best_N[0]
        change = 0.0 if last < 0 else top1 - self._top1_N[0]
        run = self._run_N[0] + 1.0 if best == last else 0.0
        self._best_N[0], self._top1_N[0], self._run_N[0] = best, top1, run
        return float(best == last), run / self._exits, change

    def _since_rows(self, best_N: np.ndarray, top1_N: FloatArray) -> FloatArray:
        last_N = np.asarray(self._best_N)
        agrees_N = best_N == last_N
        change_N = np.where(last_N < 0, 0.0, top1_N - np.asarray(self._top1_N))
        run_N = np.where(agrees_N, np.asarray(self._run_N) + 1.0, 0.0)
        self._best_N, self._top1_N = best_N.tolist(), top1_N.tolist()
        self._run_N = run_N.tolist()
        return np.stack((agrees_N, run_N / self._exits, change_N), axis=-1)


@lru_cache(maxsize=8)
def _ones(scored: int) -> FloatArray:
    return np.ones(scored, np.float32)
