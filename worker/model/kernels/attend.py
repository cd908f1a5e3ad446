"""Attention of few tokens over the slot cache, rounded as PyTorch's attention on CPUs rounds.

Shape suffixes: M tokens, N heads, H head_dim, G key and value heads, Q query heads of one key head,
P positions, X query heads side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import address, coarse_exponential, exponential, round_all
from offramp.worker.model.kernels.team import call_code, share
from offramp.worker.model.kernels.tiles import SIDE, packed

IS_BITS, COARSE, QUERY_HEADS, KEY_HEADS, HEAD_DIM, ROTATES = range(6)
"""What a layer's description holds: sizes, and how exponentials are taken."""

OF_KEY_ROWS, OF_KEY_TILES, OF_VALUES = range(6, 9)
"""The code that multiplies with keys in the cache, by rows or by tiles (0: none), and values."""

BEFORE, AFTER, OF_QUERIES, OF_KEYS = range(9, 13)
"""What follows there: the addresses of its norms' weights; 0 for a norm that it lacks."""

ATTENTION_BLOCK = 512
"""Positions that PyTorch's attention on CPUs takes at once."""

SLOT, POSITION, COUNTS = range(3)
"""What is said of a token: where its row is kept, which position it has, and 0 if it is padding."""


@compiled
def attend(
    layer: Any,
    scaling: float,
    cells_M3: Any,
    heads_MNH: Any,
    keys: int,
    values: int,
    capacity: int,
    context_MX: Any,
    team: Any,
) -> None:
    """Each token's context, of a team member's key heads: of all positions up to its own."""
    is_bits, width, kept = layer[IS_BITS] != 0, layer[HEAD_DIM], layer[KEY_HEADS]
    size = 2 if is_bits else 4
    shared = layer[QUERY_HEADS] // kept
    first, last = share(len(cells_M3) * kept, 1, team)
    for unit in range(first, last):
        m, g = unit // kept, unit % kept
        columns_X = context_MX[m, g * shared * width : (g + 1) * shared * width]
        columns_X[:] = 0
        if cells_M3[m, COUNTS] == 0:
            continue
        span = cells_M3[m, POSITION] + 1
        here = (cells_M3[m, SLOT] * kept + g) * capacity * width * size
        asking_QH = heads_MNH[m, g * shared : (g + 1) * shared]
        context_QH = columns_X.reshape(shared, width)
        attend_to(layer, scaling, asking_QH, span, keys + here, values + here, context_QH)
        round_all(columns_X, is_bits)


@compiled
def attend_to(
    layer: Any, scaling: float, asking_QH: Any, span: int, keys: int, values: int, context_QH: Any
) -> None:
    """Add up the values of one key head for the query heads that share it; context starts at 0."""
    shared, width = asking_QH.shape
    row_bytes = width * (2 if layer[IS_BITS] != 0 else 4)
    weights_QP = np.empty((shared, span), np.float32)
    tiled = span >= SIDE and layer[OF_KEY_TILES] != 0
    code = layer[OF_KEY_TILES] if tiled else layer[OF_KEY_ROWS]
    packed_BPW = packed(asking_QH) if tiled else np.empty((1, 1, 1), np.float32)
    arguments = (
        keys, row_bytes, 0, 0, 1, span, width, address(asking_QH), address(packed_BPW), shared,
        address(weights_QP), span,
    )  # fmt: skip
    call_code(code, arguments)
    totals_Q = np.zeros(shared, np.float32)
    highest_Q = np.full(shared, np.float32(-np.inf), np.float32)
    for first in range(0, span, ATTENTION_BLOCK):
        last = min(first + ATTENTION_BLOCK, span)
        for q in range(shared):
            weigh(
                layer, np.float32(scaling), weights_QP[q, first:last], highest_Q[q : q + 1],
                totals_Q[q : q + 1], context_QH[q],
            )  # fmt: skip
        parts = (
            values + first * row_bytes, row_bytes, address(weights_QP) + 4 * first, span,
            last - first, address(context_QH), shared, width,
        )  # fmt: skip
        call_code(layer[OF_VALUES], parts)
    for q in range(shared):
        share = np.float32(1) / totals_Q[q]
        for h in range(width):
            context_QH[q, h] *= share


@compiled
def weigh(
    layer: Any, scaling: float, scores_P: Any, highest_1: Any, total_1: Any, context_H: Any
) -> None:
    """Turn a block's scores into weights, in place; what was summed before comes to their scale.

    As PyTorch's attention on CPUs does it: weights are rounded after they were summed, and not
    divided by their sum.
    """
    is_bits = layer[IS_BITS] != 0
    highest = np.float32(-np.inf)
    for p in range(scores_P.size):
        scores_P[p] *= scaling
        highest = max(highest, scores_P[p])
    highest = max(highest, highest_1[0])
    coarse = scores_P.size - scores_P.size % layer[COARSE] if layer[COARSE] != 0 else 0
    for p in range(coarse):
        scores_P[p] = coarse_exponential(scores_P[p] - highest)
    for p in range(coarse, scores_P.size):
        scores_P[p] = exponential(scores_P[p] - highest)
    total = np.float32(0)
    for p in range(scores_P.size):
        total += scores_P[p]
    round_all(scores_P, is_bits)
    if total_1[0] != 0:
        before = exponential(highest_1[0] - highest)
        total += before * total_1[0]
        for h in range(context_H.size):
            context_H[h] *= before
    highest_1[0], total_1[0] = highest, total
