"""Products of int4 weights with rows in whole numbers of 8 bits, by sums of four byte products.

Shape suffixes as in ``rounding``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from offramp.worker.model.kernels.rounding import BLOCK, LINE, STEP
from offramp.worker.model.kernels.vectors import (
    F32,
    FLOAT_LANES,
    I8,
    I16,
    I32,
    INT_LANES,
    LANES,
    TiledCode,
    whole_number,
)

AHEAD = 2
"""Tiles ahead that weights are asked for."""

_BYTES = ir.VectorType(I8, LINE)
_PAIRS = ir.VectorType(I16, LINE // 2)


class RoundedProduct(TiledCode):
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

    def tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
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

    def _whole(self, count: Any, unit: int) -> Any:
        return self.b.and_(self.b.add(count, whole_number(unit - 1)), whole_number(-unit))

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
