"""A tanh MLP of one row in compiled code: a decision costs what its arithmetic costs.

Shape suffixes: I inputs, H hidden units, A outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import njit

# Sums may be reordered (so that they are vectorised), but NaN stays NaN: policies are guarded.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def compiled(function: Callable[..., Any], *, reorders: bool = True) -> Any:
    """The function compiled, and kept on disk where there is a folder for it.

    Args:
        function: What to compile.
        reorders: Whether its sums may be reordered.

    numba stamps what it keeps with the function's own file: after changing a function that
    compiled code of another file calls, remove ``__pycache__/*.nb?`` there.
    """
    fastmath = FAST if reorders else False
    return kept_on_disk(partial(njit, nogil=True, fastmath=fastmath), function)


def kept_on_disk(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """A function compiled by one of numba's decorators, kept where there is a folder for it."""
    options = {"error_model": "numpy"}
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home can be written
        return compiler(**options)(function)


@compiled
def outputs_of(x_I: Any, flat: Any, sizes: Any) -> Any:
    """Outputs [A]; NaN unless all inputs are finite (tanh would hide infinity).

    Args:
        x_I: Inputs, float32.
        flat: Each layer's weight, row by row, and then its bias, float32.
        sizes: Numbers of units from the input on.
    """
    x_H, here = x_I, 0
    total = np.float32(0)
    for i in range(x_I.size):
        total += x_I[i] * x_I[i]
    if not np.isfinite(total):
        return np.full(sizes[-1], np.float32(np.nan), np.float32)
    last = sizes.size - 2
    for layer in range(sizes.size - 1):
        inputs, outputs = sizes[layer], sizes[layer + 1]
        bias = here + inputs * outputs
        out_H = flat[bias : bias + outputs].copy()
        for i in range(inputs):
            value = x_H[i]
            for o in range(outputs):
                out_H[o] += value * flat[here + i * outputs + o]
        if layer < last:
            for o in range(outputs):
                out_H[o] = math.tanh(out_H[o])
        x_H, here = out_H, bias + outputs
    return x_H


@compiled
def best_of(x_I: Any, flat: Any, sizes: Any, mask_A: Any) -> int:
    """Place of the largest output after adding the mask; −1 if an output is not finite."""
    out_A = outputs_of(x_I, flat, sizes)
    best = 0
    for a in range(out_A.size):
        if not np.isfinite(out_A[a]):
            return -1
        if out_A[a] + mask_A[a] > out_A[best] + mask_A[best]:
            best = a
    return best
