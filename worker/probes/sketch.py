"""SKETCH_V1: scores of the most frequent tokens through a factorisation of low rank.

Shape suffixes: N rows, M sketched tokens, R rank, D width, V vocabulary, K candidates per token,
F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offramp.controller.features import SKETCH_V1, BoolArray, FloatArray, IntArray
from offramp.worker.probes.confidence import Confidence
from offramp.worker.probes.probe import ProbeInputs, part_of
from offramp.worker.probes.readout import Readout

TOKENS = 1024
"""Tokens sketched at most."""

RANK = 32
"""Rank of the factorisation."""

POWER_ITERATIONS = 4
"""Power iterations of the range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """Head rows of some tokens ≈ ``left_MR @ right_RD``.

    Attributes:
        tokens_M: The tokens, most frequent first.
        left_MR, right_RD: The factors, float32.
    """

    tokens_M: IntArray
    left_MR: FloatArray
    right_RD: FloatArray

    @classmethod
    def of(cls, readout: Readout, table_VK: IntArray) -> Sketch:
        """Sketch the tokens that a candidate table names most often.

        The same weights and table give the same sketch: the range finder's seed is fixed.
        """
        counts_V = np.bincount(table_VK.ravel(), minlength=len(table_VK))
        tokens_M = np.argsort(-counts_V, kind="stable")[:TOKENS].astype(np.int32)
        rows_MD = readout.head_rows(tokens_M[None])[0]
        if readout.norm is not None:
            # A column that the norm makes small matters little: weigh errors as scores feel them.
            weight_D = readout.norm.weight_D
            left_MR, right_RD = factorise(rows_MD * weight_D, RANK)
            safe_D = np.where(weight_D == 0, 1, weight_D)
            return cls(tokens_M, left_MR, np.asarray(right_RD / safe_D, np.float32))
        return cls(tokens_M, *factorise(rows_MD, RANK))


def factorise(rows_MD: FloatArray, rank: int) -> tuple[FloatArray, FloatArray]:
    """Factors [M, R] and [R, D] whose product is close to the best one of that rank."""
    rank = min(rank, *rows_MD.shape)
    start = np.random.default_rng(0).standard_normal((rows_MD.shape[1], rank + 8))
    basis_MQ = np.linalg.qr(rows_MD @ start.astype(np.float32))[0]
    for _ in range(POWER_ITERATIONS):
        basis_MQ = np.linalg.qr(rows_MD @ np.linalg.qr(rows_MD.T @ basis_MQ)[0])[0]
    left_QQ, values_Q, right_QD = np.linalg.svd(basis_MQ.T @ rows_MD, full_matrices=False)
    left_MR = (basis_MQ @ left_QQ)[:, :rank] * values_Q[:rank]
    return np.ascontiguousarray(left_MR), np.ascontiguousarray(right_QD[:rank])


class SketchProbe:
    """SKETCH_V1: confidence over the M most frequent tokens, from two thin products.

    Args:
        readout: The model's norm and head.
        sketch: Factorised head of the model; one serves every row of a policy.
        positions_N: Position of each token in its row.
        exits: Number of exits the policy may ask at.
    """

    def __init__(self, readout: Readout, sketch: Sketch, positions_N: IntArray, exits: int) -> None:
        self._readout = readout
        self._sketch = sketch
        self._layers = readout.stack.layers
        self._confidence = Confidence(len(positions_N), len(sketch.tokens_M), exits)
        self._position_N = positions_N / readout.stack.context

    @classmethod
    def of(cls, inputs: ProbeInputs) -> SketchProbe:
        """Make the probe from what every probe is made from."""
        assert inputs.table_VK is not None  # admission asks for the table
        sketch = inputs.readout.derived(Sketch.of, inputs.table_VK)
        return cls(inputs.readout, sketch, inputs.positions_N, inputs.exits)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of SKETCH_V1, [N, F]."""
        scores_NM = self.scores(x_ND)
        out_NF = np.empty((len(scores_NM), SKETCH_V1.width), np.float32)
        if len(scores_NM) == 1:
            sure, since = self._confidence.one(scores_NM[0])
            out_NF[0, :7] = (*sure, *since)
        else:
            out_NF[:, :4], out_NF[:, 4:7] = self._confidence.rows(scores_NM)
        out_NF[:, 7] = layer / self._layers
        out_NF[:, 8] = self._position_N
        return out_NF

    def scores(self, x_ND: Tensor) -> FloatArray:
        """Approximate scores of the sketched tokens, [N, M]."""
        normed_ND = self._readout.normed(self._readout.host(x_ND))
        thin_NR = normed_ND @ self._sketch.right_RD.T
        return np.asarray(thin_NR @ self._sketch.left_MR.T)

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._confidence = part_of(self._confidence, stay_N)
        self._position_N = self._position_N[stay_N]

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None
