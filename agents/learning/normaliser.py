"""Feature normalisation, fitted on training traces and folded into a net's first layer.

Shape suffixes: N rows, F features, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.features import FloatArray

SMALLEST_STD = 1e-3
"""Columns that hardly vary are centred, not blown up."""


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Column means and standard deviations, each [F] float32."""

    mean_F: FloatArray
    std_F: FloatArray

    @classmethod
    def fit(cls, rows_NF: FloatArray) -> Normaliser:
        """Means and deviations of some rows."""
        rows64 = rows_NF.astype(np.float64)
        std_F = np.maximum(rows64.std(0), SMALLEST_STD)
        return cls(rows64.mean(0).astype(np.float32), std_F.astype(np.float32))

    def fold(self, weight_FH: FloatArray, bias_H: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The layer that takes raw features: w/σ and b − (μ/σ)·w, computed in float64."""
        scaled_FH = weight_FH.astype(np.float64) / self.std_F[:, None]
        shifted_H = bias_H - self.mean_F.astype(np.float64) @ scaled_FH
        return scaled_FH.astype(np.float32), shifted_H.astype(np.float32)
