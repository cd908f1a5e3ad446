"""A small tanh MLP in preallocated numpy: what every learned policy decides with.

Shape suffixes: N rows, I inputs, H hidden units, A outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import FloatArray
from offramp.controller.policies.net_kernel import best_of, best_of_rows, outputs_of_rows

MAX_ROWS = 1024
"""Rows of one product of matrices at most."""

FEW_ROWS = 256
"""Up to so many rows are computed one by one; a replay asks about more, which takes matrices."""

Weights = Sequence[tuple[FloatArray, FloatArray]]
"""One (weight [in, out], bias [out]) pair per layer, float32."""


class TanhNet:
    """Linear layers with tanh between them.

    One instance serves one thread. The inputs may come in several parts, which are put side by
    side.

    Attributes:
        flat, sizes: The weights for compiled code: each layer's weight, row by row, and then its
            bias, float32; and the numbers of units from the input on, int64.

    Args:
        weights: One pair per layer.
        inputs: Number of inputs I.
        outputs: Number of outputs A.
        field: What the weights are called in errors.

    Raises:
        RequestError: shapes that do not chain from I to A.
    """

    def __init__(
        self, weights: Weights, *, inputs: int, outputs: int, field: str = "weights"
    ) -> None:
        check_chain(weights, inputs, outputs, field)
        self.weights = [(np.ascontiguousarray(w), np.ascontiguousarray(b)) for w, b in weights]
        self.outputs = outputs
        self.flat, self.sizes = _flattened(self.weights)
        self._input_NI = np.empty((MAX_ROWS, inputs), np.float32)
        self._buffers = [np.empty((MAX_ROWS, b.size), np.float32) for _, b in weights]
        self._input = np.ones(inputs + 1, np.float32)
        self._steps = []
        x = self._input
        for weight, bias in weights:
            out = np.ones(bias.size + 1, np.float32)
            self._steps.append((x.dot, np.vstack((weight, bias)).astype(np.float32), out[:-1]))
            x = out
        *self._hidden, self._last = self._steps
        # Compiled, if need be, when a policy arrives, not when a request does.
        mask_A = np.zeros(outputs, np.float32)
        best_of(self._input[:-1], self.flat, self.sizes, mask_A)
        best_of_rows(self._input[None, :-1], self.flat, self.sizes, mask_A)
        outputs_of_rows(self._input[None, :-1], self.flat, self.sizes)

    def rows(self, *parts_N: FloatArray) -> FloatArray:
        """Outputs [N, A] for up to MAX_ROWS rows; a view that the next call reuses."""
        rows = len(parts_N[0])
        x_NI = parts_N[0] if len(parts_N) == 1 else self._joined(parts_N)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(self.weights):
            out = self._buffers[i][:rows]
            np.dot(x_NI, weight, out=out)
            out += bias
            if i < last:
                np.tanh(out, out=out)
            x_NI = out
        return x_NI

    def __reduce__(self) -> tuple[Any, ...]:
        # The buffers are views of each other, which a plain copy would cut apart.
        inputs = self._input.size - 1
        return partial(TanhNet, inputs=inputs, outputs=self.outputs), (self.weights,)

    def values(self, x_NI: FloatArray) -> FloatArray:
        """Outputs [N, A], each row's as if it were alone; compiled.

        Raises:
            PolicyFaultError: an output is not finite.
        """
        return finite(outputs_of_rows(x_NI, self.flat, self.sizes))

    def row(self, *parts: FloatArray) -> FloatArray:
        """Outputs [A] for one row; a view that the next call reuses.

        A third of the time that the matrices take: vectors, and each bias as one more row.
        """
        self._fill(parts)
        for times, weight, out in self._hidden:
            times(weight, out)
            np.tanh(out, out)
        times, weight, out = self._last
        times(weight, out)
        return out

    def best(self, mask_A: FloatArray, *parts: FloatArray) -> int:
        """Place of one row's largest output, after adding a mask of 0 and −∞; compiled.

        Raises:
            PolicyFaultError: an output is not finite, so the inputs were not, or overflowed.
        """
        self._fill(parts)
        best = int(best_of(self._input[:-1], self.flat, self.sizes, mask_A))
        if best < 0:
            raise PolicyFaultError("the logits are not finite")
        return best

    def bests(self, mask_A: FloatArray, *parts_N: FloatArray) -> NDArray[np.int64]:
        """What ``best`` gives for each of N rows, [N].

        Of up to FEW_ROWS rows each is computed as if it were alone, so that its neighbours in an
        engine change nothing for it; more, which only a replay asks about, go by matrices.

        Raises:
            PolicyFaultError: an output of some row is not finite.
        """
        x_NI = np.concatenate(parts_N, axis=1, dtype=np.float32)
        if len(x_NI) > FEW_ROWS:
            parts = [x_NI[at : at + MAX_ROWS] for at in range(0, len(x_NI), MAX_ROWS)]
            return np.concatenate([(finite(self.rows(part)) + mask_A).argmax(1) for part in parts])
        best_N: NDArray[np.int64] = best_of_rows(x_NI, self.flat, self.sizes, mask_A)
        if (best_N < 0).any():
            raise PolicyFaultError("the logits are not finite")
        return best_N

    def _fill(self, parts: Sequence[FloatArray]) -> None:
        column = 0
        for part in parts:
            end = column + part.size
            self._input[column:end] = part
            column = end

    def _joined(self, parts_N: tuple[FloatArray, ...]) -> FloatArray:
        x_NI = self._input_NI[: len(parts_N[0])]
        column = 0
        for part in parts_N:
            x_NI[:, column : column + part.shape[1]] = part
            column += part.shape[1]
        return x_NI


def finite(logits: FloatArray) -> FloatArray:
    """Give the logits back, if all are finite.

    Raises:
        PolicyFaultError: one is not.
    """
    flat = logits.ravel()
    # Finite only if all are; np.isfinite(...).all() takes three times as long.
    if not math.isfinite(flat.dot(flat)):
        raise PolicyFaultError("the logits are not finite")
    return logits


def _flattened(weights: Weights) -> tuple[FloatArray, NDArray[np.int64]]:
    parts = [part.ravel() for pair in weights for part in pair]
    sizes = [len(weights[0][0]), *(bias.size for _, bias in weights)]
    return np.concatenate(parts).astype(np.float32), np.array(sizes, np.int64)


def check_chain(weights: Weights, inputs: int, outputs: int, field: str = "weights") -> None:
    """Refuse layers that do not lead from the inputs to the outputs.

    Raises:
        RequestError: naming the first layer that does not fit.
    """
    width = inputs
    for i, (weight, bias) in enumerate(weights):
        if weight.ndim != 2 or weight.shape[0] != width or bias.shape != (weight.shape[1],):
            raise RequestError(
                f"{field}[{i}]",
                f"weight {weight.shape} and bias {bias.shape} do not take {width} inputs",
                "Give weight [in, out] and bias [out]",
            )
        width = weight.shape[1]
    if not weights or width != outputs:
        raise RequestError(field, f"the last layer has {width} outputs, not {outputs}")
