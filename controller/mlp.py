"""The learned policy: a small multi-layer perceptron in preallocated numpy.

Shape suffixes: N rows, F features, H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policy import IndexArray

MAX_ROWS = 1024
"""Rows one call can decide; more are decided in slices."""


class MlpPolicy:
    """Leave when a tanh MLP's single output exceeds a threshold.

    Buffers are preallocated, so a decision allocates nothing; one instance serves one thread.

    Attributes:
        flat, sizes: The same weights for compiled code: each layer's weight, row by row, and then
            its bias, float32; and the number of units from the input on, int64.

    Args:
        exits: Layers to ask after, ascending.
        schema: The features read; F = schema.width.
        weights: One (weight [in, out], bias [out]) pair per layer, float32; the last has out = 1.
        threshold: In logits; the row leaves if output > threshold.
        candidates_VK: Candidate table for the candidate probe, or None.

    Raises:
        RequestError: shapes that do not chain from F to 1.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        weights: Sequence[tuple[FloatArray, FloatArray]],
        threshold: float = 0.0,
        candidates_VK: IntArray | None = None,
    ) -> None:
        _check_chain(schema.width, weights)
        self.exits = exits
        self.schema = schema
        self.threshold = threshold
        self.candidates_VK = candidates_VK
        self.weights = [(np.ascontiguousarray(w), np.ascontiguousarray(b)) for w, b in weights]
        self._buffers = [np.empty((MAX_ROWS, b.size), np.float32) for _, b in weights]
        self._leave = np.empty(MAX_ROWS, np.bool_)
        self._leave_1 = self._leave[:1]
        self._one = _OneRow(self.weights)
        self.flat, self.sizes = _flattened(self.weights)

    def logits(self, features_NF: FloatArray) -> FloatArray:
        """The MLP's output per row, [N]; a view that the next call reuses (N ≤ MAX_ROWS)."""
        rows = len(features_NF)
        x = features_NF
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(self.weights):
            out = self._buffers[i][:rows]
            np.dot(x, weight, out=out)
            out += bias
            if i < last:
                np.tanh(out, out=out)
            x = out
        return x[:, 0]

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose logit exceeds the threshold; a view that the next call reuses.

        Raises:
            PolicyFaultError: a logit is not finite, so the features were not, or overflowed.
        """
        rows = len(features_NF)
        if rows == 1:
            logit = self._one.logit(features_NF[0])
            _require_finite(logit)
            self._leave_1[0] = logit > self.threshold
            return self._leave_1
        if rows > MAX_ROWS:
            half = rows // 2
            head = self.leave(features_NF[:half]).copy()
            return np.concatenate([head, self.leave(features_NF[half:])])
        logits_N = self.logits(features_NF)
        # NaN or infinite wherever one of them is; a sum of squares costs less than np.isfinite.
        _require_finite(float(logits_N.dot(logits_N)))
        return np.greater(logits_N, self.threshold, out=self._leave[:rows])


class _OneRow:
    """The same MLP for one row: vectors for matrices, and each bias as one more row of a weight.

    A third of the time that the matrices take for it; each layer reads a vector that ends in 1.
    """

    def __init__(self, weights: Sequence[tuple[FloatArray, FloatArray]]) -> None:
        self._input = np.ones(weights[0][0].shape[0] + 1, np.float32)
        self._features = self._input[:-1]
        self._steps = []
        x = self._input
        for weight, bias in weights[:-1]:
            hidden = np.ones(bias.size + 1, np.float32)
            self._steps.append((x.dot, _augmented(weight, bias), hidden[:-1]))
            x = hidden
        self._last = x
        self._output = _augmented(*weights[-1])[:, 0].copy()

    def logit(self, features_F: FloatArray) -> float:
        self._features[:] = features_F
        for times, weight, out in self._steps:
            times(weight, out)
            np.tanh(out, out)
        return float(self._last.dot(self._output))


def _flattened(weights: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, IndexArray]:
    parts = [part.ravel() for pair in weights for part in pair]
    sizes = [len(weights[0][0]), *(bias.size for _, bias in weights)]
    return np.concatenate(parts).astype(np.float32), np.array(sizes, np.int64)


def _augmented(weight: FloatArray, bias: FloatArray) -> FloatArray:
    return np.vstack((weight, bias)).astype(np.float32)


def _require_finite(value: float) -> None:
    if not math.isfinite(value):
        raise PolicyFaultError(f"logits sum up to {value}")


def _check_chain(width: int, weights: Sequence[tuple[FloatArray, FloatArray]]) -> None:
    for i, (weight, bias) in enumerate(weights):
        if weight.ndim != 2 or weight.shape[0] != width or bias.shape != (weight.shape[1],):
            raise RequestError(
                f"weights[{i}]",
                f"weight {weight.shape} and bias {bias.shape} do not take {width} inputs",
                "Give weight [in, out] and bias [out]",
            )
        width = weight.shape[1]
    if not weights or width != 1:
        raise RequestError("weights", f"the last layer has {width} outputs, not 1")
