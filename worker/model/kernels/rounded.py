"""Products of int4 weights with rows in whole numbers of 8 bits: half the time of exact rows.

A row's neighbouring ``BLOCK`` inputs share a power of two as their scale, and each is rounded to a
whole number from -127 to 127 (MXINT8, OCP Microscaling Formats Specification 1.0, sections 5 and
6.3, without a scale of its own below 2^-100), which bfloat16 holds exactly. So the product is that
of the restored weight with the rounded row. Whole numbers are multiplied and added without an
error, in whatever order.

Shape suffixes: M rows, I inputs, B blocks of a row, P numbers of a row filled up to whole steps,
L lanes of four inputs, G groups of an output's weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
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
    I16,
    I32,
    INT_LANES,
    LANES,
    VectorCode,
    int_lanes,
    whole_number,
)

BLOCK = 32
"""Neighbouring inputs of a row that share a scale, and int4 weights that do."""

LINE = 64
"""Bytes of weights that are read at once, and of numbers of a row."""

STEP = 2 * LINE
"""Inputs that are multiplied at once: four blocks."""

TILE = 4
"""Outputs, and rows at most, whose sums are kept in registers together."""

AHEAD = 2
"""Tiles ahead that weights are asked for."""

BITS_OF_NUMBER = 6
"""The largest of a block's inputs lies between 2^6 and 2^7 of its scale."""

SMALLEST = 27 << 23
"""Bits of 2^-100: a block whose inputs are all smaller counts as 0."""

_EXPONENT = 0x7F800000
_BYTES = ir.VectorType(I8, LINE)
_PAIRS = ir.VectorType(I16, LINE // 2)
_FOUR = ir.VectorType(I32, 4)


def rounded_rows(x: Tensor) -> Tensor:
    """Round rows to what ``whole_numbers`` makes of them; a block that is not finite becomes NaN.

    Args:
        x: Rows [..., I] of any dtype that holds 8 bits exactly; ``BLOCK`` divides I.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    exponent = (largest.view(torch.int32) & _EXPONENT) - (BITS_OF_NUMBER << 23)
    scale = exponent.view(torch.float32)
    numbers = (blocks / scale).round().clamp(-127, 127)
    rounded = torch.where(largest.view(torch.int32) < SMALLEST, 0, numbers * scale)
    return torch.where(largest.isfinite(), rounded, torch.nan).flatten(-2).to(x.dtype)


@compiled
def whole_numbers(x_MI: Any) -> Any:
    """Round rows of float32; give them in the order of the weights, and what goes with them.

    Of ``STEP`` inputs those come first whose weights lie in the lower four bits.

    Returns:
        Numbers [M, P / 4], int8 by four in a float32; and of each row, side by side [M, 1, ..]: the
        scale of each lane [L], -8 times the sum of each lane's numbers (bits of int32, [L]), and
        each group's sum, padded by 0 to whole vectors [G].
    """
    rows, inputs = x_MI.shape
    blocks = inputs // BLOCK
    steps = -(-inputs // STEP)
    lanes = steps * LANES
    numbers_MP = np.zeros((rows, steps * STEP // 4), np.float32)
    beside = np.zeros((rows, 1, 2 * lanes + -(-blocks // LANES) * LANES), np.float32)
    for m in range(rows):
        _round_row(
            address(x_MI) + m * x_MI.strides[0],
            address(numbers_MP) + m * numbers_MP.strides[0],
            address(beside) + m * beside.strides[0],
            blocks,
            lanes,
        )
    return numbers_MP, beside


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _round_row(_: Any, x: Any, numbers: Any, beside: Any, blocks: Any, lanes: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _Rounding(builder, values).emit()
        return context.get_dummy_value()

    return types.void(x, numbers, beside, blocks, lanes), emit


class _Rounding(VectorCode):
    """Writes the code that rounds a row without a branch: branches on inputs are guessed wrong."""

    def __init__(self, builder: Any, arguments: Any) -> None:
        super().__init__(builder)
        self.x, self.numbers, self.beside, self.blocks, lanes = arguments
        self.minus = builder.add(self.beside, self.times(lanes, 4))
        self.sums = builder.add(self.beside, self.times(lanes, 8))

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
        step, place = b.sdiv(block, whole_number(4)), b.srem(block, whole_number(4))
        at = b.add(self.at(self.numbers, step, STEP), self.times(place, BLOCK // 2))
        for half, offset in zip(whole, (0, LINE), strict=True):
            kind = ir.VectorType(I8, LANES)
            pointer = b.inttoptr(b.add(at, whole_number(offset)), kind.as_pointer())
            b.store(b.trunc(half, kind), pointer, align=1)
        parts = self._by_lane(b.add(*whole))
        self._put(b.mul(parts, ir.Constant(_FOUR, [-8] * 4)), self.at(self.minus, block, 16))
        self._put(self._four(scale), self.at(self.beside, block, 16))
        total = b.fmul(scale, b.sitofp(self._reduced("add", parts), F32))
        b.store(total, b.inttoptr(self.at(self.sums, block, 4), F32.as_pointer()))

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

    def _by_lane(self, numbers: Any) -> Any:
        """Sums of four neighbours."""
        parts = [
            self.b.shuffle_vector(
                numbers, numbers, ir.Constant(_FOUR, list(range(first, LANES, 4)))
            )
            for first in range(4)
        ]
        return self.b.add(self.b.add(parts[0], parts[1]), self.b.add(parts[2], parts[3]))

    def _reduced(self, how: str, vector: Any) -> Any:
        signature = ir.FunctionType(I32, (vector.type,))
        name = f"llvm.vector.reduce.{how}.v{vector.type.count}i32"
        return self.b.call(
            cgutils.get_or_insert_function(self.b.module, signature, name), (vector,)
        )

    def _four(self, scale: Any) -> Any:
        kind = ir.VectorType(F32, 4)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scale, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, one, ir.Constant(_FOUR, [0] * 4))

    def _put(self, four: Any, place: Any) -> None:
        self.b.store(four, self.b.inttoptr(place, four.type.as_pointer()), align=4)


class RoundedProduct(VectorCode):
    """Writes the code of one product: numba gives the addresses and sizes.

    Args:
        builder: numba's, at the place where the code goes.
        arguments: See ``code_for``; ``x`` and ``sums`` are what ``whole_numbers`` gave.
    """

    def __init__(self, builder: Any, arguments: Any) -> None:
        super().__init__(builder)
        (
            self.weights, self.stride, self.units, self.in_groups, _, self.outputs,
            self.inputs, self.x, self.beside, self.rows, self.y, self.y_stride,
        ) = arguments  # fmt: skip
        self.groups = builder.sdiv(self.inputs, whole_number(BLOCK))
        self.padded = self._whole(self.groups, LANES)
        self.filled = self._whole(self.inputs, STEP)
        # Of a row: its lanes' scales, what goes beside them, and the groups' sums.
        self.lane_bytes = builder.sdiv(self.filled, whole_number(2))

    def emit(self) -> None:
        """All outputs by tiles, each over all rows, so that its weights stay in the first cache."""
        whole = self.b.and_(self.outputs, whole_number(-TILE))
        with cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(TILE)) as (o, _):
            self._all_rows(TILE, o)
        with cgutils.for_range_slice(self.b, whole, self.outputs, whole_number(1)) as (o, _):
            self._all_rows(1, o)

    def _whole(self, count: Any, unit: int) -> Any:
        return self.b.and_(self.b.add(count, whole_number(unit - 1)), whole_number(-unit))

    def _all_rows(self, outputs: int, o: Any) -> None:
        whole = self.b.and_(self.rows, whole_number(-TILE))
        with cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(TILE)) as (m, _):
            self._tile(outputs, TILE, o, m)
        for count, first in ((2, whole), (1, self.b.and_(self.rows, whole_number(-2)))):
            bit = self.b.and_(self.rows, whole_number(count))
            with self.b.if_then(self.b.icmp_signed("!=", bit, whole_number(0))):
                self._tile(outputs, count, o, first)

    def _tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
        """Sums of some outputs of some rows, which start at o and m."""
        sums = [[self.register() for _ in range(rows)] for _ in range(outputs)]
        length = self.b.add(self.times(self.lane_bytes, 2), self.times(self.padded, 4))
        beside_at = [self.row(self.beside, m, k, length) for k in range(rows)]
        self._sum_steps(sums, o, m, beside_at)
        self._add_zeros(sums, o, beside_at)
        for k, of_output in enumerate(sums):
            for j, total in enumerate(of_output):
                row = self.b.mul(self.b.add(m, whole_number(j)), self.y_stride)
                place = self.at(self.y, self.b.add(row, self.b.add(o, whole_number(k))), 4)
                unit = self.load(self.row(self.units, o, k, whole_number(8)), F32, lanes=1)
                value = self.b.fmul(self.total(self.b.load(total)), unit)
                self.b.store(value, self.b.inttoptr(place, F32.as_pointer()))

    def _sum_steps(self, sums: Any, o: Any, m: Any, beside_at: Any) -> None:
        """Whole numbers of four blocks by the scales of both; beyond a row's end they are 0."""
        w_at = [self.row(self.weights, o, k, self.stride) for k in range(len(sums))]
        line = self.times(self.groups, 2)
        scales_at = [self.row(self.in_groups, o, k, line) for k in range(len(sums))]
        x_at = [self.row(self.x, m, k, self.filled) for k in range(len(beside_at))]
        ahead = self.times(self.stride, len(sums) * AHEAD)
        with cgutils.for_range(self.b, self.b.sdiv(self.filled, whole_number(STEP))) as loop:
            lane = self.times(loop.index, LINE)
            rows = [
                (*(self._integers(self.at(x, loop.index, STEP, 0), half) for half in (0, LINE)),
                 self._integers(self.b.add(beside, self.lane_bytes), lane),
                 self.load(self.b.add(beside, lane), F32))
                for x, beside in zip(x_at, beside_at, strict=True)
            ]  # fmt: skip
            for of_output, at, scales in zip(sums, w_at, scales_at, strict=True):
                place = self.b.add(at, lane)
                self.ask_for(self.b.add(place, ahead))
                low, high = self._weights(place)
                four = self.counted(self.at(scales, loop.index, 4), is_signed=False, lanes=4)
                scale = self._by_block(four)
                for total, (x_low, x_high, begun, of_row) in zip(of_output, rows, strict=True):
                    part = self._dot(self._dot(begun, low, x_low), high, x_high)
                    value = self.b.sitofp(part, FLOAT_LANES)
                    both = self.b.fmul(scale, of_row)
                    self.b.store(self.fma(value, both, self.b.load(total)), total)

    def _add_zeros(self, sums: Any, o: Any, beside_at: Any) -> None:
        """What the zero points add: beyond a row's groups its sums are 0."""
        line = self.times(self.groups, 2)
        zeros_at = [
            self.b.add(self.row(self.in_groups, o, k, line), self.groups) for k in range(len(sums))
        ]
        units = [self.unit_of_zeros(self.units, o, k) for k in range(len(sums))]
        sums_at = [self.b.add(at, self.times(self.lane_bytes, 2)) for at in beside_at]
        every = cgutils.for_range_slice(self.b, whole_number(0), self.padded, whole_number(LANES))
        with every as (g, _):
            of_rows = [self.load(self.at(at, g, 4), F32) for at in sums_at]
            for of_output, zeros, unit in zip(sums, zeros_at, units, strict=True):
                whole = self.counted(self.b.add(zeros, g), is_signed=True)
                zero = self.b.fmul(whole, unit)
                for total, summed in zip(of_output, of_rows, strict=True):
                    self.b.store(self.fma(zero, summed, self.b.load(total)), total)

    def _weights(self, place: Any) -> tuple[Any, Any]:
        """Numbers from 0 to 15 of the lower and of the upper four bits."""
        pairs = self.load(place, I8, LINE)
        mask = ir.Constant(_BYTES, [15] * LINE)
        four = ir.Constant(_PAIRS, [4] * (LINE // 2))
        upper = self.b.bitcast(self.b.lshr(self.b.bitcast(pairs, _PAIRS), four), _BYTES)
        return self.b.and_(pairs, mask), self.b.and_(upper, mask)

    def _integers(self, place: Any, offset: Any) -> Any:
        at = offset if not isinstance(offset, int) else whole_number(offset)
        return self.load(self.b.add(place, at), I32)

    def _by_block(self, four: Any) -> Any:
        """A block's scale in each of its four lanes."""
        places = ir.Constant(INT_LANES, [lane // 4 for lane in range(LANES)])
        return self.b.shuffle_vector(four, four, places)

    def _dot(self, total: Any, weights: Any, x: Any) -> Any:
        """Add the products of four neighbouring bytes to each lane."""
        name = "llvm.x86.avx512.vpdpbusd.512"
        if not multiplies_bytes():
            return self._dot_by_parts(total, weights, self.b.bitcast(x, _BYTES))
        kind = _BYTES if binding.llvm_version_info[0] >= LLVM_OF_BYTES else INT_LANES
        signature = ir.FunctionType(INT_LANES, (INT_LANES, kind, kind))
        code = cgutils.get_or_insert_function(self.b.module, signature, name)
        return self.b.call(code, (total, *(self.b.bitcast(each, kind) for each in (weights, x))))

    def _dot_by_parts(self, total: Any, weights: Any, x: Any) -> Any:
        """The same where no instruction does it."""
        for first in range(4):
            places = ir.Constant(INT_LANES, list(range(first, LINE, 4)))
            ours = self.b.zext(self.b.shuffle_vector(weights, weights, places), INT_LANES)
            theirs = self.b.sext(self.b.shuffle_vector(x, x, places), INT_LANES)
            total = self.b.add(total, self.b.mul(ours, theirs))
        return total


LLVM_OF_BYTES = 22
"""From this version of LLVM on, the instruction's operands are vectors of bytes."""


def multiplies_bytes() -> bool:
    """Whether this processor multiplies bytes by fours and adds them up (AVX-512 VNNI)."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512f"))
