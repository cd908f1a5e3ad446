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
from offramp.worker.model.kernels.floats import exponential, read, round_all, rounded, write
from offramp.worker.model.kernels.matrix import INPUTS, OUTPUTS, add_bias, product_into, weighted

QUERIES, KEYS, VALUES, OUT, GATE, UP, DOWN = range(7)
"""The order of a layer's matrices."""


@compiled
def run_layers(
    layers: Any,
    matrices: Any,
    reals: Any,
    first: int,
    last: int,
    x: int,
    out: int,
    cos: int,
    sin: int,
    cells_M3: Any,
    keys: int,
    values: int,
    layer_bytes: int,
    capacity: int,
) -> None:
    """Run some tokens through neighbouring layers; keys and values are written to the cache.

    Args:
        layers: A layer's description per row (``IS_BITS`` and its neighbours), int64.
        matrices: For each layer one description of a matrix per row (``KIND`` and its neighbours).
        reals: For each layer the epsilons of the norms before attention, before the MLP, of queries
            and of keys; then what scores are multiplied by.
        first, last: The layers that are run: from ``first`` on, without ``last``.
        x, out: Addresses of the states that come in and go out, [M, D].
        cos, sin: Addresses of the tokens' angles, [M, H].
        cells_M3: See ``SLOT`` and its neighbours, int64; of a row's tokens each sees those before.
        keys, values: Addresses of the first layer's cache, [slots, G, capacity, H].
        layer_bytes: From one layer's keys to the next one's.
        capacity: Positions of a slot.
    """
    is_bits = layers[first, IS_BITS] != 0
    x_MD = np.empty((len(cells_M3), matrices[first, QUERIES, INPUTS]), np.float32)
    read(x, is_bits, x_MD.reshape(-1))
    for index in range(first, last):
        at = index * layer_bytes
        cache = (keys + at, values + at, capacity)
        step(layers[index], matrices[index], reals[index], cos, sin, cells_M3, cache, x_MD)
    write(x_MD.reshape(-1), is_bits, out)


@compiled
def step(
    layer: Any, matrices: Any, reals: Any, cos: int, sin: int, cells_M3: Any, cache: Any, x_MD: Any
) -> None:
    """Run one layer, the states in place."""
    is_bits = layer[IS_BITS] != 0
    tokens = len(cells_M3)
    keys, values, capacity = cache
    normed_MD = np.empty_like(x_MD)
    normed(x_MD, layer[BEFORE], reals[0], is_bits, normed_MD)
    asked, kept = layer[QUERY_HEADS], layer[KEY_HEADS]
    heads_MNH = np.empty((tokens, asked + 2 * kept, layer[HEAD_DIM]), np.float32)
    heads_MX = heads_MNH.reshape(tokens, -1)
    weighted_MD, sums = weighted(matrices[QUERIES], normed_MD)
    first = 0
    for part in (QUERIES, KEYS, VALUES):
        last = first + matrices[part, OUTPUTS]
        linear(matrices[part], weighted_MD, sums, is_bits, heads_MX[:, first:last])
        first = last
    turn(layer, reals, cos, sin, heads_MNH)
    keep(layer, cells_M3, heads_MNH, keys, values, capacity)
    context_MX = np.zeros((tokens, asked * layer[HEAD_DIM]), np.float32)
    attend(layer, reals[4], cells_M3, heads_MNH, keys, values, capacity, context_MX)
    y_MD = np.empty_like(x_MD)
    weighted_MX, of_context = weighted(matrices[OUT], context_MX)
    linear(matrices[OUT], weighted_MX, of_context, is_bits, y_MD)
    add(y_MD, is_bits, x_MD)
    normed(x_MD, layer[AFTER], reals[1], is_bits, normed_MD)
    gate_MF = think(matrices, normed_MD, is_bits)
    weighted_MF, of_gate = weighted(matrices[DOWN], gate_MF)
    linear(matrices[DOWN], weighted_MF, of_gate, is_bits, y_MD)
    add(y_MD, is_bits, x_MD)


@compiled
def think(matrices: Any, normed_MD: Any, is_bits: bool) -> Any:
    """The MLP up to where it is projected down again, [M, F]."""
    gate_MF = np.empty((len(normed_MD), matrices[GATE, OUTPUTS]), np.float32)
    up_MF = np.empty_like(gate_MF)
    weighted_MD, sums = weighted(matrices[GATE], normed_MD)
    linear(matrices[GATE], weighted_MD, sums, is_bits, gate_MF)
    linear(matrices[UP], weighted_MD, sums, is_bits, up_MF)
    gated(up_MF.reshape(-1), is_bits, gate_MF.reshape(-1))
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
def linear(matrix: Any, x_MI: Any, sums: Any, is_bits: bool, y_MO: Any) -> None:
    """A product with its bias, rounded; of what ``weighted`` gave."""
    product_into(matrix, x_MI, sums, y_MO)
    add_bias(matrix, is_bits, y_MO)
    for m in range(len(y_MO)):
        round_all(y_MO[m], is_bits)


@compiled
def turn(layer: Any, reals: Any, cos: int, sin: int, heads_MNH: Any) -> None:
    """Norm queries and keys, where the layer does, and rotate them by position."""
    is_bits, width = layer[IS_BITS] != 0, layer[HEAD_DIM]
    half = width // 2
    cos_H = np.empty(width, np.float32)
    sin_H = np.empty(width, np.float32)
    turned_H = np.empty(width, np.float32)
    size = 2 if is_bits else 4
    for m in range(len(heads_MNH)):
        read(cos + m * width * size, is_bits, cos_H)
        read(sin + m * width * size, is_bits, sin_H)
        for n in range(layer[QUERY_HEADS] + layer[KEY_HEADS]):
            is_query = n < layer[QUERY_HEADS]
            norm = layer[OF_QUERIES] if is_query else layer[OF_KEYS]
            head_1H = heads_MNH[m, n : n + 1]
            if norm != 0:
                normed(head_1H, norm, reals[2 if is_query else 3], is_bits, head_1H)
            if layer[ROTATES] == 0:
                continue
            for h in range(half):
                left, right = head_1H[0, h], head_1H[0, half + h]
                turned_H[h] = rounded(left * cos_H[h], is_bits) - rounded(right * sin_H[h], is_bits)
                turned_H[half + h] = rounded(right * cos_H[half + h], is_bits) + rounded(
                    left * sin_H[half + h], is_bits
                )
            for h in range(width):
                head_1H[0, h] = rounded(turned_H[h], is_bits)


@compiled
def keep(layer: Any, cells_M3: Any, heads_MNH: Any, keys: int, values: int, capacity: int) -> None:
    """Write the tokens' keys and values to the cache; padding goes nowhere."""
    is_bits, width, kept = layer[IS_BITS] != 0, layer[HEAD_DIM], layer[KEY_HEADS]
    size = 2 if is_bits else 4
    for m in range(len(cells_M3)):
        if cells_M3[m, COUNTS] == 0:
            continue
        for g in range(kept):
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
