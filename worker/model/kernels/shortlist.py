"""The likeliest tokens: of known logits, or by an int4 head and then exactly by the native one.

Shape suffixes: N rows, D width, V vocabulary, B blocks of neighbouring tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import bits_of, read, write
from offramp.worker.model.kernels.matrix import KernelMatrix

LISTED = 32
"""Tokens at least whose logits the native head says."""

BLOCK = 64
"""Neighbouring tokens at most of which the largest logit is found first."""


class Shortlist:
    """Says logits: of most tokens by an int4 head, of the likeliest by the native one.

    Args:
        coarse: The head's int4 form, with its bias.
        weight_VD: The native head's weight, its rows side by side, bfloat16 or float32.
        bias_V: The native head's bias, if it has one.
    """

    def __init__(self, coarse: KernelMatrix, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self._coarse = coarse
        self._kept = (weight_VD, bias_V)  # addresses do not keep alive
        bias = 0 if bias_V is None else bias_V.data_ptr()
        self._native = (weight_VD.data_ptr(), weight_VD.stride(0) * weight_VD.element_size(), bias)

    def product(self, x: Tensor) -> Tensor:
        """Logits over the last dimension; each row's bits depend on that row alone."""
        x = x.contiguous()
        y = self._coarse.product(x)
        width, tokens = x.shape[-1], y.shape[-1]
        sizes = (x.numel() // width, width, tokens)
        _say_again(x.data_ptr(), y.data_ptr(), x.dtype is torch.bfloat16, sizes, self._native)
        return y


@compiled
def _say_again(x: int, y: int, is_bits: bool, sizes: Any, native: Any) -> None:
    rows, width, tokens = sizes
    weights, stride, bias = native
    size = 2 if is_bits else 4
    x_D, w_D = np.empty(width, np.float32), np.empty(width, np.float32)
    one = np.empty(1, np.float32)
    for n in range(rows):
        read(x + n * width * size, is_bits, x_D)
        here = y + n * tokens * size
        for token in _likeliest(here, is_bits, tokens):
            read(weights + token * stride, is_bits, w_D)
            total = np.float32(0)
            for d in range(width):
                total += x_D[d] * w_D[d]
            if bias != 0:
                read(bias + token * size, is_bits, one)
                total += one[0]
            one[0] = total
            write(one, is_bits, here + token * size)


def likeliest(logits_NV: Tensor) -> list[int]:
    """The most likely token of each row: the first of equal ones; NaN is above all numbers.

    Args:
        logits_NV: Logits on the CPU, bfloat16 or float32.
    """
    logits_NV = logits_NV.contiguous()
    is_bits = logits_NV.dtype is torch.bfloat16
    best_N = _largest_of(logits_NV.data_ptr(), is_bits, *logits_NV.shape)
    return best_N.tolist()  # type: ignore[no-any-return]


@compiled
def _largest_of(logits: int, is_bits: bool, rows: int, tokens: int) -> Any:
    size = 2 if is_bits else 4
    best_N = np.zeros(rows, np.int64)
    for n in range(rows):
        keys_V = _keys_of(logits + n * tokens * size, is_bits, tokens)
        largest = np.int32(-0x80000000)
        for v in range(tokens):
            largest = max(largest, keys_V[v])
        while keys_V[best_N[n]] != largest:
            best_N[n] += 1
    return best_N


@compiled
def _keys_of(logits: int, is_bits: bool, tokens: int) -> Any:
    """Whole numbers in the order of the logits: only their largest is vector code."""
    logits_V = np.empty(tokens, np.float32)
    read(logits, is_bits, logits_V)
    keys_V = np.empty(tokens, np.int32)
    for v in range(tokens):
        bits = np.int32(bits_of(logits_V[v]))
        size = bits & np.int32(0x7FFFFFFF)
        key = size if bits == size else -size
        keys_V[v] = np.int32(0x7FFFFFFF) if size > np.int32(0x7F800000) else key
    return keys_V


@compiled
def _likeliest(logits: int, is_bits: bool, tokens: int) -> Any:
    """Tokens whose logit is as large as the largest of the ``LISTED``-th block."""
    keys_V = _keys_of(logits, is_bits, tokens)
    width = max(1, min(BLOCK, tokens // LISTED))
    blocks = -(-tokens // width)
    largest_B = np.empty(blocks, np.int32)
    for block in range(blocks):
        first = block * width
        largest = np.int32(-0x80000000)
        for v in range(first, min(first + width, tokens)):
            largest = max(largest, keys_V[v])
        largest_B[block] = largest
    rank = max(0, blocks - LISTED)
    least = np.partition(largest_B, rank)[rank]
    found = np.empty(tokens, np.int64)
    count = 0
    for block in range(blocks):
        if largest_B[block] >= least:
            for v in range(block * width, min((block + 1) * width, tokens)):
                if keys_V[v] >= least:
                    found[count] = v
                    count += 1
    return found[:count]
