"""A matrix as the compiled kernels take it, and its products with few rows.

Shape suffixes: O outputs, I inputs, N rows, M rows of activations, G groups of an output's weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import address, pointer, read, round_all, write
from offramp.worker.model.kernels.multiply import (
    BITS,
    BLOCK,
    BYTES,
    FLOATS,
    INT4,
    INT8,
    ROUNDED,
    TILES,
    code_for,
)
from offramp.worker.model.kernels.rounding import whole_numbers
from offramp.worker.model.kernels.team import TeamTask, call_code, meet, share, team_of
from offramp.worker.model.kernels.tiles import fits_tiles, has_tiles, packed
from offramp.worker.model.kernels.vectors import LANES

KINDS = {torch.bfloat16: BITS, torch.float32: FLOATS, torch.int8: INT8, torch.uint8: INT4}
"""The kind of weights that a tensor of a dtype holds."""

UNIT = 32
"""Outputs that one thread of a team takes at once: two tiles, eight vectors of sums."""

ALONE_BELOW = 1 << 22
"""Matrices of fewer bytes are not shared: waking a helper is too large a part of their time."""

KIND, CODE, WEIGHTS, STRIDE, SCALES, GROUPS, GROUP, OUTPUTS, INPUTS, BIAS = range(10)
"""What a matrix's description holds: addresses, sizes, and 0 for what it lacks."""


class KernelMatrix:
    """A matrix in the form that compiled code reads; nothing of it is copied.

    Args:
        weight: bfloat16, float32 or int8 [O, I]; for int4 uint8 [O, I / 2] (``INT4``).
        bias_O: Added to the product, in the activations' dtype; None: nothing.
        scales: int8's [O]; or int4's units [O, 2]: of an output's scales, and how many of these
            make one of its zero points; float32.
        groups: int4's scales (uint8) and zero points (bits of int8) in such units [O, 2, G]; behind
            them a vector can be read.
        group_size: Inputs that share one of int4's scales.
        outputs: Number of outputs of int8 weights, or of int4 ones in groups of 32, that are
            interleaved: their rows are rounded to whole numbers (``rounded``), and int8's weights
            are kept without a sign. None: weights lie row by row.

    Attributes:
        nbytes: Bytes of weights, scales and zero points.
    """

    def __init__(
        self,
        weight: Tensor,
        bias_O: Tensor | None = None,
        scales: Tensor | None = None,
        groups: Tensor | None = None,
        group_size: int = 1,
        *,
        outputs: int | None = None,
    ) -> None:
        self._kept = (weight, bias_O, scales, groups)  # addresses do not keep alive
        self.nbytes = sum(part.nbytes for part in (weight, scales, groups) if part is not None)
        rows, columns = weight.shape
        kind = KINDS[weight.dtype]
        inputs = 2 * columns if kind == INT4 else columns
        if outputs is None:
            outputs = rows
        else:
            kind = ROUNDED if kind == INT4 else BYTES
        self._outputs = outputs
        self.described = np.zeros(10, np.int64)
        self.described[[KIND, CODE]] = kind, code_for(kind)
        self.described[STRIDE] = weight.stride(0) * weight.element_size()
        self.described[[GROUP, OUTPUTS, INPUTS]] = group_size, outputs, inputs
        for place, part in zip((WEIGHTS, BIAS, SCALES, GROUPS), self._kept, strict=True):
            self.described[place] = 0 if part is None else part.data_ptr()
        self._of_floats = self.described  # rows of float32 do not go into tiles
        if kind == BITS and fits_tiles(outputs, inputs) and has_tiles():
            self.described = self.described.copy()
            self.described[[KIND, CODE]] = TILES, code_for(TILES)

    def description(self, is_bits: bool) -> NDArray[np.int64]:
        """What compiled code is given, for rows kept in bfloat16 or in float32; see ``KIND``."""
        return self.described if is_bits else self._of_floats

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ + b over the last dimension; each row's bits depend on that row alone."""
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self._outputs)
        rows, is_bits = x.numel() // x.shape[-1], x.dtype is torch.bfloat16
        described = self.description(is_bits)
        job_J = np.array([described.ctypes.data, x.data_ptr(), is_bits, rows, y.data_ptr()])
        threads = 1 if self.nbytes < ALONE_BELOW else torch.get_num_threads()
        team_of(threads).run(MULTIPLY, job_J)
        return y


def is_readable(weight_OI: Tensor) -> bool:
    """Whether compiled code can read a matrix: on the CPU, its inputs side by side."""
    kept = weight_OI.dtype in (torch.bfloat16, torch.float32)
    return kept and weight_OI.device.type == "cpu" and weight_OI.stride(1) == 1


@compiled
def weighted(matrix: Any, x_NI: Any) -> Any:
    """Rows as a kind of weights needs them, and what goes with them; with plain weights nothing.

    Tiles take their rows by the second, see ``packed``, and rows of whole numbers what
    ``whole_numbers`` gives.

    int4's kernel reads a number q as 1 + q / 256 in the first half of a block, and as 1 + q / 16 in
    the second. So inputs are multiplied by 256 and 16, and per group of a row there are two sums:
    what the scale s multiplies beside q, to take the ones away again and to centre q, and what the
    zero point z multiplies: Σ x ((q - 8) s + z) = s (Σ x' (1 + q / ..) - Σ x' - 8 Σ x) + z Σ x.

    Returns:
        Rows [N, I], and sums [N, 2, groups padded by 0 to whole vectors].
    """
    if matrix[KIND] == TILES:
        return x_NI, packed(x_NI)
    if matrix[KIND] == ROUNDED or matrix[KIND] == BYTES:
        return whole_numbers(x_NI)
    if matrix[KIND] != INT4:
        return x_NI, np.zeros((1, 2, 1), np.float32)
    rows, inputs = x_NI.shape
    group = matrix[GROUP]
    groups = inputs // group
    weighted_NI = np.empty_like(x_NI)
    sums_N2G = np.zeros((rows, 2, -(-groups // LANES) * LANES), np.float32)
    for n in range(rows):
        for g in range(groups):
            first, second = np.float32(0), np.float32(0)
            for block in range(g * group, (g + 1) * group, BLOCK):
                for i in range(block, block + LANES):
                    weighted_NI[n, i] = np.float32(256) * x_NI[n, i]
                    weighted_NI[n, i + LANES] = np.float32(16) * x_NI[n, i + LANES]
                    first += x_NI[n, i]
                    second += x_NI[n, i + LANES]
            sums_N2G[n, 0, g] = np.float32(-256 - 8) * first - np.float32(16 + 8) * second
            sums_N2G[n, 1, g] = first + second
    return weighted_NI, sums_N2G


@compiled
def product_into(matrix: Any, x_NI: Any, sums_N2G: Any, y_NO: Any) -> None:
    """Multiply rows that ``weighted`` gave; add no bias, and round nothing.

    Args:
        matrix: See ``KIND`` and its neighbours.
        x_NI, sums_N2G: What ``weighted`` returned.
        y_NO: What is written, float32; its rows may lie apart.
    """
    arguments = (
        matrix[WEIGHTS], matrix[STRIDE], matrix[SCALES], matrix[GROUPS], matrix[GROUP],
        matrix[OUTPUTS], matrix[INPUTS], address(x_NI), address(sums_N2G), len(x_NI),
        address(y_NO), y_NO.strides[0] // 4,
    )  # fmt: skip
    call_code(matrix[CODE], arguments)


@compiled
def rows_of_matrix(matrix: Any, first: int, last: int, is_bits: bool) -> Any:
    """Describe some outputs of a matrix.

    Args:
        matrix: See ``KIND`` and its neighbours.
        first, last: The outputs, from the first on, without the last.
        is_bits: Whether the bias is kept in bfloat16.
    """
    part = matrix.copy()
    part[OUTPUTS] = last - first
    part[WEIGHTS] += first * matrix[STRIDE]
    if matrix[BIAS] != 0:
        part[BIAS] += first * (2 if is_bits else 4)
    grouped = matrix[KIND] == INT4 or matrix[KIND] == ROUNDED
    groups = matrix[INPUTS] // matrix[GROUP] if grouped else 1
    part[SCALES] += first * (8 if grouped else 4)
    part[GROUPS] += first * groups * 2
    return part


@compiled
def linear_into(
    matrix: Any, x_MI: Any, sums: Any, is_bits: bool, y_MO: Any, team: Any
) -> tuple[int, int]:
    """Write a team member's outputs of a product with its bias, rounded; say which these are.

    Args:
        matrix: See ``KIND`` and its neighbours.
        x_MI, sums: What ``weighted`` returned.
        is_bits: Whether activations are kept in bfloat16.
        y_MO: What is written.
        team: See ``RANK`` and its neighbours.
    """
    first, last = share(matrix[OUTPUTS], UNIT, team)
    if first < last:
        part, part_MO = rows_of_matrix(matrix, first, last, is_bits), y_MO[:, first:last]
        product_into(part, x_MI, sums, part_MO)
        add_bias(part, is_bits, part_MO)
        for m in range(len(part_MO)):
            round_all(part_MO[m], is_bits)
    return first, last


@compiled
def add_bias(matrix: Any, is_bits: bool, y_NO: Any) -> None:
    """Add a matrix's bias to its product, if it has one."""
    if matrix[BIAS] != 0:
        bias_O = np.empty(y_NO.shape[1], np.float32)
        read(matrix[BIAS], is_bits, bias_O)
        for n in range(len(y_NO)):
            for o in range(bias_O.size):
                y_NO[n, o] += bias_O[o]


def _multiply_rows(job: int, rank: int, size: int, flags: int) -> None:
    job_J = carray(pointer(job), 5, np.int64)
    matrix = carray(pointer(job_J[0]), BIAS + 1, np.int64)
    is_bits, rows, width = job_J[2] != 0, job_J[3], matrix[OUTPUTS]
    x_NI = np.empty((rows, matrix[INPUTS]), np.float32)
    read(job_J[1], is_bits, x_NI.reshape(-1))
    y_NO = np.empty((rows, width), np.float32)
    weighted_NI, sums_N2G = weighted(matrix, x_NI)
    first, last = linear_into(matrix, weighted_NI, sums_N2G, is_bits, y_NO, (rank, size, flags))
    for n in range(rows):
        place = job_J[4] + (n * width + first) * (2 if is_bits else 4)
        write(y_NO[n, first:last], is_bits, place)
    meet((rank, size, flags))


MULTIPLY = TeamTask(_multiply_rows)
