"""Rows in whole numbers of 8 bits, as weights of fewer bits may be multiplied with them.

A row's neighbouring ``BLOCK`` inputs share a power of two as their scale, and each is rounded to a
whole number from -127 to 127 (MXINT8, OCP Microscaling Formats Specification 1.0, sections 5 and
6.3, without a scale of its own below 2^-100), which bfloat16 holds exactly. So the product is that
of the restored weight with the rounded row. Whole numbers are multiplied and added without an
error, in whatever order.

Shape suffixes: M rows, I inputs, B blocks of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import address
from offramp.worker.model.kernels.vectors import (
    F32,
    FLOAT_LANES,
    I8,
    I32,
    INT_LANES,
    LANES,
    VectorCode,
    int_lanes,
    whole_number,
)

BLOCK = 32
"""Neighbouring inputs of a row that share a scale, and int4 weights that do."""

BITS_OF_NUMBER = 6
"""The largest of a block's inputs lies between 2^6 and 2^7 of its scale."""

SMALLEST = 27 << 23
"""Bits of 2^-100: a block whose inputs are all smaller counts as 0."""

_EXPONENT = 0x7F800000


def rounded_rows(x: Tensor) -> Tensor:
    """Round rows to what ``whole_numbers`` makes of them; a block that is not finite becomes NaN.

    Args:
        x: Rows [..., I] of any dtype that holds 8 bits exactly; ``BLOCK`` divides I.
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = (largest.view(torch.int32) & _EXPONENT) - (BITS_OF_NUMBER << 23)
    scale = exponent.view(torch.float32)
    numbers = (blocks / scale).round().clamp(-127, 127)
    rounded = torch.where(largest.view(torch.int32) < SMALLEST, 0, numbers * scale)
    return torch.where(largest.isfinite(), rounded, torch.nan).flatten(-2).to(x.dtype)


def interleaved(part: Tensor, together: int) -> Tensor:
    """Numbers of ``LANES`` outputs lane by lane: so many of each, then the next ones of each.

    Args:
        part: What each output has, [O, ...].
        together: Neighbouring numbers of an output that stay together.

    Returns:
        The same [outputs filled up with 0 to whole lanes, numbers of each].
    """
    flat = part.flatten(1)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % LANES))
    by_lane = flat.view(len(flat) // LANES, LANES, -1, together)
    return by_lane.transpose(1, 2).reshape(len(flat), -1)


@compiled
def whole_numbers(x_MI: Any) -> Any:
    """Round rows of float32; give their numbers, and what goes with each block.

    Returns:
        Numbers [M, I / 4], int8 by four in a float32; and of each row, side by side [M, 1, 3 B]:
        each block's scale, -8 times the sum of its numbers (bits of int32), and its sum.
    """
    rows, inputs = x_MI.shape
    blocks = inputs // BLOCK
    numbers_MP = np.empty((rows, inputs // 4), np.float32)
    beside = np.empty((rows, 1, 3 * blocks), np.float32)
    for m in range(rows):
        _round_row(
            address(x_MI) + m * x_MI.strides[0],
            address(numbers_MP) + m * numbers_MP.strides[0],
            address(beside) + m * beside.strides[0],
            blocks,
        )
    return numbers_MP, beside


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _round_row(_: Any, x: Any, numbers: Any, beside: Any, blocks: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _Rounding(builder, values).emit()
        return context.get_dummy_value()

    return types.void(x, numbers, beside, blocks), emit


class _Rounding(VectorCode):
    """Writes the code that rounds a row without a branch: branches on inputs are guessed wrong."""

    def __init__(self, builder: Any, arguments: Any) -> None:
        super().__init__(builder)
        self.x, self.numbers, self.beside, self.blocks = arguments
        self.minus = builder.add(self.beside, self.times(self.blocks, 4))
        self.sums = builder.add(self.beside, self.times(self.blocks, 8))

    def emit(self) -> None:
        """Round block by block."""
        with cgutils.for_range(self.b, self.blocks) as loop:
            self._round(loop.index)

    def _round(self, block: Any) -> None:
        b = self.b
        first = self.times(block, BLOCK)
        halves = [self.load(self.at(self.x, first, 4, n), F32) for n in (0, LANES)]
        largest = self._largest(halves)
        exponent = b.and_(largest, ir.Constant(I32, _EXPONENT))
        counts = b.icmp_unsigned(">=", largest, ir.Constant(I32, SMALLEST))
        finite = b.icmp_unsigned("<", exponent, ir.Constant(I32, _EXPONENT))
        shift = BITS_OF_NUMBER << 23
        bits = b.select(counts, b.sub(exponent, ir.Constant(I32, shift)), ir.Constant(I32, 0))
        bits = b.select(finite, bits, ir.Constant(I32, 0x7FC00000))
        scale = b.bitcast(bits, F32)
        inverse = b.sub(ir.Constant(I32, (254 << 23) + shift), exponent)
        inverse = b.select(b.and_(counts, finite), inverse, ir.Constant(I32, 0))
        factor = self.splat(b.bitcast(inverse, F32))
        whole = [self._whole(b.fmul(half, factor)) for half in halves]
        for half, offset in zip(whole, (0, LANES), strict=True):
            self._put(b.trunc(half, ir.VectorType(I8, LANES)), self.numbers, block, BLOCK, offset)
        total = self._reduced("add", b.add(*whole))
        self._put(scale, self.beside, block, 4)
        self._put(b.mul(total, ir.Constant(I32, -8)), self.minus, block, 4)
        self._put(b.fmul(scale, b.sitofp(total, F32)), self.sums, block, 4)

    def _largest(self, halves: Any) -> Any:
        """Bits of the largest magnitude; NaN is larger than any number."""
        mask = int_lanes(0x7FFFFFFF)
        low, high = (self.b.and_(self.b.bitcast(half, INT_LANES), mask) for half in halves)
        larger = self.b.select(self.b.icmp_unsigned(">", low, high), low, high)
        return self._reduced("umax", larger)

    def _whole(self, scaled: Any) -> Any:
        for sign, bound in ((">", -127.0), ("<", 127.0)):
            limit = ir.Constant(FLOAT_LANES, [bound] * LANES)
            # NaN compares as false, and becomes the bound: its scale says what it was.
            scaled = self.b.select(self.b.fcmp_ordered(sign, scaled, limit), scaled, limit)
        signature = ir.FunctionType(FLOAT_LANES, (FLOAT_LANES,))
        rint = cgutils.get_or_insert_function(self.b.module, signature, "llvm.rint.v16f32")
        return self.b.fptosi(self.b.call(rint, (scaled,)), INT_LANES)

    def _reduced(self, how: str, vector: Any) -> Any:
        signature = ir.FunctionType(I32, (vector.type,))
        name = f"llvm.vector.reduce.{how}.v{vector.type.count}i32"
        return self.b.call(
            cgutils.get_or_insert_function(self.b.module, signature, name), (vector,)
        )

    def _put(self, value: Any, base: Any, block: Any, size: int, offset: int = 0) -> None:
        """Keep a block's value, or a part of it."""
        place = self.b.add(self.at(base, block, size), whole_number(offset))
        self.b.store(value, self.b.inttoptr(place, value.type.as_pointer()), align=1)
