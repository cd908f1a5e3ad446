"""A tanh MLP of one row in compiled code: a decision costs what its arithmetic costs.

Shape suffixes: I inputs, H hidden units, A outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
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
    """
    fastmath = FAST if reorders else False
    return kept_on_disk(partial(njit, nogil=True, fastmath=fastmath), function)


def kept_on_disk(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """A function compiled by one of numba's decorators, kept where there is a folder for it."""
    options = {"error_model": "numpy"}
    forget_stale(Path(function.__code__.co_filename).parent)
    try:
        return compiler(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor a home can be written
        return compiler(**options)(function)


@cache
def forget_stale(folder: Path) -> None:
    """Remove what was compiled in a folder before its sources, or those here, changed.

    numba compares a function's own file alone, and would run it with what another file's functions
    took and gave before: after an update, that ends in a crash.
    """
    kept = folder / "__pycache__"
    stamp = kept / "compiled.sha256"
    sources = sorted({*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")})
    now = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    # Where nothing can be written, numba keeps code elsewhere, and an update renews every file.
    with contextlib.suppress(OSError):
        if stamp.exists() and stamp.read_text(encoding="ascii") == now:
            return
        for code in kept.glob("*.nb[ci]"):
            code.unlink(missing_ok=True)
        kept.mkdir(exist_ok=True)
        stamp.write_text(now, encoding="ascii")


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


@compiled
def best_of_rows(x_NI: Any, flat: Any, sizes: Any, mask_A: Any) -> Any:
    """What ``best_of`` gives for each of N rows, by the same arithmetic: [N] int64."""
    best_N = np.empty(len(x_NI), np.int64)
    for n in range(len(x_NI)):
        best_N[n] = best_of(x_NI[n], flat, sizes, mask_A)
    return best_N


@compiled
def outputs_of_rows(x_NI: Any, flat: Any, sizes: Any) -> Any:
    """What ``outputs_of`` gives for each of N rows, by the same arithmetic: [N, A]."""
    out_NA = np.empty((len(x_NI), sizes[-1]), np.float32)
    for n in range(len(x_NI)):
        out_NA[n] = outputs_of(x_NI[n], flat, sizes)
    return out_NA
