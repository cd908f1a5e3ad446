"""The candidate probe's arithmetic, compiled: one call per exit for all rows.

In numpy the same features take some forty small calls, and between two layers of a real decode
step, whose weights have driven the interpreter's code and data out of the caches, each of them
costs several times what it costs alone (docs/probes.md).

Shape suffixes: N rows, K candidates, D width, V vocabulary, F features, M numbers remembered of a
row; 2 a norm's weight and bias.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.controller.policies.net_kernel import compiled

Bits = NDArray[np.uint16]
"""Bits of bfloat16 numbers, which numpy does not know."""

Rows = FloatArray | Bits

LOGIT_SCALE = 10.0
"""Divides raw scores so that the feature is of order one."""

SMALLEST = 1e-36
"""A smaller squared length counts as this: the embedding of a padding token may be all zeros."""

BEST, TOP1, RUN, SQUARE, PLACE = range(5)
"""Remembered per row: place of the best candidate (-1: none yet), its probability, probes in a row
with it, squared length of the last state; position / context length."""

MEMORY = 5
"""Numbers remembered per row, M."""

COLUMNS = CANDIDATES_V1.width


@compiled
def widen(row_D: Any, is_bits: bool, bits_D: Any, out_D: Any) -> None:
    """A row as float32; bits are bfloat16's, and ``bits_D`` shares its memory with ``out_D``."""
    if is_bits:
        for d in range(row_D.size):
            bits_D[d] = np.uint32(row_D[d]) << np.uint32(16)
    else:
        for d in range(row_D.size):
            out_D[d] = row_D[d]


@compiled
def _dot(a_D: Any, b_D: Any) -> Any:
    total = np.float32(0)
    for d in range(a_D.size):
        total += a_D[d] * b_D[d]
    return total


@compiled
def _normalise(x_D: Any, square: Any, norm_2D: Any, eps: float, is_centred: bool, y_D: Any) -> None:
    """The final norm: (x − mean?) / rms · weight + bias."""
    mean = np.float32(0)
    if is_centred:
        for d in range(x_D.size):
            mean += x_D[d]
        mean /= x_D.size
    scale = np.float32(1 / math.sqrt(square / x_D.size - mean * mean + eps))
    for d in range(x_D.size):
        y_D[d] = (x_D[d] - mean) * scale * norm_2D[0, d] + norm_2D[1, d]


@compiled
def _sure(scores_K: Any, out_F: Any) -> int:
    """top1, margin, entropy / ln K and top score of a softmax; the best one's place."""
    best = 0
    for k in range(scores_K.size):
        if scores_K[k] > scores_K[best]:
            best = k
    top = scores_K[best]
    total, mean, second = np.float32(0), np.float32(0), np.float32(0)
    for k in range(scores_K.size):
        shifted = scores_K[k] - top
        weight = np.float32(math.exp(shifted))
        total += weight
        mean += weight * shifted
        if k != best and weight > second:
            second = weight
    out_F[0] = 1 / total
    out_F[1] = (1 - second) / total
    out_F[2] = (math.log(total) - mean / total) / math.log(scores_K.size)
    out_F[3] = top / LOGIT_SCALE
    return best


@compiled
def _since(best: int, memory_M: Any, exits: int, out_F: Any) -> None:
    """agrees, run length / exits, change of top1; and remembers."""
    agrees = best == memory_M[BEST]
    run = memory_M[RUN] + 1 if agrees else 0.0
    out_F[6] = 1.0 if agrees else 0.0
    out_F[7] = run / exits
    out_F[8] = 0.0 if memory_M[BEST] < 0 else out_F[0] - memory_M[TOP1]
    memory_M[BEST], memory_M[TOP1], memory_M[RUN] = best, out_F[0], run


@compiled
def row_columns(
    head_VD: Any,
    head_bits: bool,
    candidates_K: Any,
    x_D: Any,
    norm: tuple[Any, float, bool],
    last_D: Any,
    memory_M: Any,
    depth: float,
    exits: int,
    spare: tuple[Any, Any, Any],
    out_F: Any,
) -> None:
    """CANDIDATES_V1 of one row; ``last_D``, ``memory_M`` and ``out_F`` are written.

    Args:
        head_VD: The LM head, float32 or the bits of bfloat16 as uint16.
        head_bits: Whether the head holds bfloat16, as bits.
        candidates_K: Rows of it to score, int32.
        x_D: The hidden state, float32.
        norm: The final norm's weight and bias [2, D], its epsilon, and whether it is centred.
        last_D: The state of the last probe.
        memory_M: See BEST and its neighbours.
        depth: Layer / number of layers.
        exits: Number of exits the policy may ask at.
        spare: Two arrays of D and one of K numbers, to compute in.
        out_F: Where the columns go.
    """
    norm_2D, eps, is_centred = norm
    # Arrays of their own: rows of one would not be known as contiguous, and not be vectorised.
    y_D, row_D, scores_K = spare
    row_u = row_D.view(np.uint32)
    square, product = _dot(x_D, x_D), _dot(x_D, last_D)
    _normalise(x_D, square, norm_2D, eps, is_centred, y_D)
    for k in range(candidates_K.size):
        if head_bits:
            widen(head_VD[candidates_K[k]], True, row_u, row_D)
            scores_K[k] = _dot(row_D, y_D)
        else:
            scores_K[k] = _dot(head_VD[candidates_K[k]], y_D)
    best = _sure(scores_K, out_F)
    here, before = max(square, SMALLEST), max(memory_M[SQUARE], SMALLEST)
    out_F[4] = product / math.sqrt(here) / math.sqrt(before)
    out_F[5] = 0.5 * math.log(here / before)
    _since(best, memory_M, exits, out_F)
    out_F[9], out_F[10] = depth, memory_M[PLACE]
    memory_M[SQUARE] = square
    last_D[:] = x_D


@compiled
def candidate_features(
    head_VD: Any,
    candidates_NK: Any,
    x_ND: Any,
    norm: tuple[Any, float, bool],
    last_ND: Any,
    memory_NM: Any,
    depth: float,
    exits: int,
    are_bits: tuple[bool, bool],
) -> FloatArray:
    """CANDIDATES_V1 of N rows, [N, F]; updates ``last_ND`` and ``memory_NM``.

    Args:
        x_ND: Hidden states, float32 or bits.
        are_bits: Whether head and states hold bfloat16, as bits.
        head_VD, candidates_NK, norm, last_ND, memory_NM, depth, exits: Mean what they do in
            ``row_columns``; here for N rows.
    """
    rows, scored = candidates_NK.shape
    width = x_ND.shape[1]
    out_NF = np.empty((rows, COLUMNS), np.float32)
    x_D = np.empty(width, np.float32)
    spare = (np.empty(width, np.float32), np.empty(width, np.float32), np.empty(scored, np.float32))
    for n in range(rows):
        widen(x_ND[n], are_bits[1], x_D.view(np.uint32), x_D)
        row_columns(
            head_VD, are_bits[0], candidates_NK[n], x_D, norm, last_ND[n], memory_NM[n], depth,
            exits, spare, out_NF[n],
        )  # fmt: skip
    return out_NF


@compiled
def remember(x_ND: Any, is_bits: bool, place_N: Any) -> Any:
    """The states as float32, and a fresh memory of rows that were never probed."""
    rows, width = x_ND.shape
    last_ND = np.empty((rows, width), np.float32)
    memory_NM = np.empty((rows, MEMORY), np.float32)
    for n in range(rows):
        begin(x_ND[n], is_bits, place_N[n], last_ND[n], memory_NM[n])
    return last_ND, memory_NM


@compiled
def begin(x_D: Any, is_bits: bool, place: Any, last_D: Any, memory_M: Any) -> None:
    """Remember of a row the state before its first probe, and that there was none."""
    widen(x_D, is_bits, last_D.view(np.uint32), last_D)
    memory_M[:] = 0
    memory_M[BEST], memory_M[PLACE] = -1, place
    memory_M[SQUARE] = _dot(last_D, last_D)
