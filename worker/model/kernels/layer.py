"""A Llama-like decoder layer for few rows as one compiled call.

It rounds where Hugging Face's layer rounds; only the order within a sum is its own, and that is the
same for every row, whatever rows stand beside it.

Shape suffixes: M tokens of the step, of any rows; D width, A query heads, G key and value heads,
N heads of all three, H head_dim, F rows of the MLP, X query heads side by side.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.attend import (
    AFTER,
    BEFORE,
    COUNTS,
    HEAD_DIM,
    IS_BITS,
    KEY_HEADS,
    OF_KEYS,
    OF_QUERIES,
    POSITION,
    QUERY_HEADS,
    ROTATES,
    SLOT,
    attend,
)
from offramp.worker.model.kernels.floats import (
    exponential,
    pointer,
    read,
    round_all,
    rounded,
    write,
)
from offramp.worker.model.kernels.matrix import BIAS, INPUTS, OUTPUTS, linear_into, weighted
from offramp.worker.model.kernels.team import TeamTask, meet, share

QUERIES, KEYS, VALUES, OUT, GATE, UP, DOWN = range(7)
"""The order of a layer's matrices."""


(
    TOKENS, FIRST, LAST, LAYERS, X, OUT_X, COS, SIN, CELLS, CACHED_KEYS, CACHED_VALUES, LAYER_BYTES,
    CAPACITY, DESCRIBED, MATRICES, REALS, HEADS, CONTEXT, ADDED, GATED,
) = range(20)  # fmt: skip
"""What a job of ``run_layers`` says: sizes and addresses."""

REAL_COUNT = 5
"""Of each layer: the epsilons of the norms before attention, before the MLP, of queries and of
keys; then what scores are multiplied by."""


@compiled
def step(
    job_J: Any, layer: Any, matrices: Any, reals: Any, index: int, x_MD: Any, team: Any
) -> None:
    """Run one layer, the states in place."""
    is_bits, tokens = layer[IS_BITS] != 0, job_J[TOKENS]
    context_MX = attention(job_J, layer, matrices, reals, index, x_MD, team)
    added_MD = carray(pointer(job_J[ADDED]), (tokens, x_MD.shape[1]), np.float32)
    weighted_MX, of_context = weighted(matrices[OUT], context_MX)
    linear_into(matrices[OUT], weighted_MX, of_context, is_bits, added_MD, team)
    meet(team)
    add(added_MD, is_bits, x_MD)
    normed_MD = np.empty_like(x_MD)
    normed(x_MD, layer[AFTER], reals[1], is_bits, normed_MD)
    gate_MF = think(job_J, matrices, normed_MD, is_bits, team)
    weighted_MF, of_gate = weighted(matrices[DOWN], gate_MF)
    linear_into(matrices[DOWN], weighted_MF, of_gate, is_bits, added_MD, team)
    meet(team)
    add(added_MD, is_bits, x_MD)


@compiled
def attention(
    job_J: Any, layer: Any, matrices: Any, reals: Any, index: int, x_MD: Any, team: Any
) -> Any:
    """The context of all tokens, [M, X]; their keys and values are then in the cache."""
    is_bits, tokens, width = layer[IS_BITS] != 0, job_J[TOKENS], layer[HEAD_DIM]
    asked, kept = layer[QUERY_HEADS], layer[KEY_HEADS]
    normed_MD = np.empty_like(x_MD)
    normed(x_MD, layer[BEFORE], reals[0], is_bits, normed_MD)
    heads_MNH = carray(pointer(job_J[HEADS]), (tokens, asked + 2 * kept, width), np.float32)
    heads_MX = heads_MNH.reshape(tokens, -1)
    weighted_MD, sums = weighted(matrices[QUERIES], normed_MD)
    first = 0
    for part in (QUERIES, KEYS, VALUES):
        last = first + matrices[part, OUTPUTS]
        linear_into(matrices[part], weighted_MD, sums, is_bits, heads_MX[:, first:last], team)
        first = last
    meet(team)
    cells_M3 = carray(pointer(job_J[CELLS]), (tokens, 3), np.int64)
    at, capacity = index * job_J[LAYER_BYTES], job_J[CAPACITY]
    keys, values = job_J[CACHED_KEYS] + at, job_J[CACHED_VALUES] + at
    turn(layer, reals, job_J[COS], job_J[SIN], heads_MNH, team)
    keep(layer, cells_M3, heads_MNH, keys, values, capacity, team)
    meet(team)
    context_MX = carray(pointer(job_J[CONTEXT]), (tokens, asked * width), np.float32)
    attend(layer, reals[4], cells_M3, heads_MNH, keys, values, capacity, context_MX, team)
    meet(team)
    return context_MX


@compiled
def think(job_J: Any, matrices: Any, normed_MD: Any, is_bits: bool, team: Any) -> Any:
    """The MLP up to where it is projected down again, [M, F]."""
    tokens, width = len(normed_MD), matrices[GATE, OUTPUTS]
    gate_MF = carray(pointer(job_J[GATED]), (tokens, width), np.float32)
    up_MF = np.empty((tokens, width), np.float32)
    weighted_MD, sums = weighted(matrices[GATE], normed_MD)
    linear_into(matrices[GATE], weighted_MD, sums, is_bits, gate_MF, team)
    first, last = linear_into(matrices[UP], weighted_MD, sums, is_bits, up_MF, team)
    for m in range(tokens):
        gated(up_MF[m, first:last], is_bits, gate_MF[m, first:last])
    meet(team)
    return gate_MF


@compiled
def normed(x_MD: Any, weight: int, eps: float, is_bits: bool, out_MD: Any) -> None:
    """The RMS norm of each row; the weight is multiplied after rounding, as Hugging Face does."""
    width = x_MD.shape[1]
    weight_D = np.empty(width, np.float32)
    read(weight, is_bits, weight_D)
    for m in range(len(x_MD)):
        total = np.float32(0)
        for d in range(width):
            total += x_MD[m, d] * x_MD[m, d]
        factor = np.float32(1) / np.float32(math.sqrt(total / np.float32(width) + eps))
        for d in range(width):
            out_MD[m, d] = x_MD[m, d] * factor
        round_all(out_MD[m], is_bits)
        for d in range(width):
            out_MD[m, d] *= weight_D[d]
        round_all(out_MD[m], is_bits)


@compiled
def norm_rows(
    x: int, weight: int, eps: float, is_bits: bool, rows: int, width: int, out: int
) -> None:
    """Norm rows that lie at an address, and write them to another."""
    x_MD = np.empty((rows, width), np.float32)
    read(x, is_bits, x_MD.reshape(-1))
    normed(x_MD, weight, np.float32(eps), is_bits, x_MD)
    write(x_MD.reshape(-1), is_bits, out)


@compiled
def turn(layer: Any, reals: Any, cos: int, sin: int, heads_MNH: Any, team: Any) -> None:
    """Norm a member's queries and keys, where the layer does, and rotate them by position."""
    is_bits, width = layer[IS_BITS] != 0, layer[HEAD_DIM]
    cos_H = np.empty(width, np.float32)
    sin_H = np.empty(width, np.float32)
    turned_H = np.empty(width, np.float32)
    size = 2 if is_bits else 4
    shared = layer[QUERY_HEADS] // layer[KEY_HEADS]
    first, last = share(len(heads_MNH) * layer[KEY_HEADS], 1, team)
    for unit in range(first, last):
        m, g = unit // layer[KEY_HEADS], unit % layer[KEY_HEADS]
        read(cos + m * width * size, is_bits, cos_H)
        read(sin + m * width * size, is_bits, sin_H)
        for k in range(shared + 1):
            n = g * shared + k if k < shared else layer[QUERY_HEADS] + g
            is_query = n < layer[QUERY_HEADS]
            norm = layer[OF_QUERIES] if is_query else layer[OF_KEYS]
            head_1H = heads_MNH[m, n : n + 1]
            if norm != 0:
                normed(head_1H, norm, reals[2 if is_query else 3], is_bits, head_1H)
            if layer[ROTATES] == 0:
                continue
            rotate(head_1H[0], cos_H, sin_H, is_bits, turned_H)


@compiled
def rotate(head_H: Any, cos_H: Any, sin_H: Any, is_bits: bool, turned_H: Any) -> None:
    """Rotate a head, or the part of it that has angles, in place; the last is room to work in."""
    half = head_H.size // 2
    for h in range(half):
        left, right = head_H[h], head_H[half + h]
        turned_H[h] = rounded(left * cos_H[h], is_bits) - rounded(right * sin_H[h], is_bits)
        turned_H[half + h] = rounded(right * cos_H[half + h], is_bits) + rounded(
            left * sin_H[half + h], is_bits
        )
    for h in range(head_H.size):
        head_H[h] = rounded(turned_H[h], is_bits)


@compiled
def keep(
    layer: Any, cells_M3: Any, heads_MNH: Any, keys: int, values: int, capacity: int, team: Any
) -> None:
    """Write a member's keys and values to the cache; padding goes nowhere."""
    is_bits, width, kept = layer[IS_BITS] != 0, layer[HEAD_DIM], layer[KEY_HEADS]
    size = 2 if is_bits else 4
    first, last = share(len(cells_M3) * kept, 1, team)
    for unit in range(first, last):
        m, g = unit // kept, unit % kept
        if cells_M3[m, COUNTS] == 0:
            continue
        row = (cells_M3[m, SLOT] * kept + g) * capacity + cells_M3[m, POSITION]
        n = layer[QUERY_HEADS] + g
        write(heads_MNH[m, n], is_bits, keys + row * width * size)
        write(heads_MNH[m, n + kept], is_bits, values + row * width * size)


@compiled
def gated(up_N: Any, is_bits: bool, gate_N: Any) -> None:
    """SiLU of the gate times up, in the gate's place."""
    # Loop by loop: in one, compilers find nothing to vectorise.
    for n in range(gate_N.size):
        gate = gate_N[n]
        gate_N[n] = gate / (np.float32(1) + exponential(-gate))
    round_all(gate_N, is_bits)
    for n in range(gate_N.size):
        gate_N[n] *= up_N[n]
    round_all(gate_N, is_bits)


@compiled
def add(y_MD: Any, is_bits: bool, x_MD: Any) -> None:
    """Add what a part of the layer gave to what came in."""
    for m in range(len(x_MD)):
        for d in range(x_MD.shape[1]):
            x_MD[m, d] += y_MD[m, d]
        round_all(x_MD[m], is_bits)


def run_layers(job: int, rank: int, size: int, flags: int) -> None:
    """Run some tokens through neighbouring layers; keys and values are written to the cache.

    Each thread of a team keeps the states for itself, and computes its share of what is made of
    them: outputs of products, key heads of attention. A sum is never divided.

    Args:
        job: Address of what is run, int64: the number of tokens M; the layers from FIRST on,
            without LAST, of how many there are; addresses of the states that come in and go out
            [M, D], of the tokens' angles [M, H], of their cells [M, 3] (``SLOT`` and its
            neighbours; of a row's tokens each sees those before), of the first layer's cache
            [slots, G, capacity, H]; bytes from one layer's keys to the next one's, and positions
            of a slot; addresses of a layer's description per row (``IS_BITS`` and its neighbours),
            for each layer of one description of a matrix per row (``KIND`` and its neighbours),
            and of ``REAL_COUNT`` numbers; then of memory for what the threads make together,
            float32: heads, context, what is added to the states, and the MLP's inner states.
        rank, size, flags: The team, see ``RANK`` and its neighbours.
    """
    job_J = carray(pointer(job), GATED + 1, np.int64)
    tokens, count = job_J[TOKENS], job_J[LAYERS]
    layers = carray(pointer(job_J[DESCRIBED]), (count, OF_KEYS + 1), np.int64)
    matrices = carray(pointer(job_J[MATRICES]), (count, DOWN + 1, BIAS + 1), np.int64)
    reals = carray(pointer(job_J[REALS]), (count, REAL_COUNT), np.float32)
    is_bits = layers[job_J[FIRST], IS_BITS] != 0
    x_MD = np.empty((tokens, matrices[job_J[FIRST], QUERIES, INPUTS]), np.float32)
    read(job_J[X], is_bits, x_MD.reshape(-1))
    for index in range(job_J[FIRST], job_J[LAST]):
        step(job_J, layers[index], matrices[index], reals[index], index, x_MD, (rank, size, flags))
    if rank == 0:
        write(x_MD.reshape(-1), is_bits, job_J[OUT_X])
    meet((rank, size, flags))


RUN_LAYERS = TeamTask(run_layers)
