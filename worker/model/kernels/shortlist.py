"""The likeliest tokens by an int4 head, whose logits the native head's rows then say exactly.

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


@compiled
def _likeliest(logits: int, is_bits: bool, tokens: int) -> Any:
    """Tokens whose logit is as large as the largest of the ``LISTED``-th block."""
    logits_V = np.empty(tokens, np.float32)
    read(logits, is_bits, logits_V)
    keys_V = np.empty(tokens, np.int32)
    for v in range(tokens):
        bits = np.int32(bits_of(logits_V[v]))
        # In the order of the numbers, as whole numbers: only their largest is vector code.
        keys_V[v] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
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
