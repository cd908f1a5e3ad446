"""Products of int4 and int8 weights with rows in whole numbers of 8 bits, by four bytes at once.

Shape suffixes as in ``rounding``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

from offramp.worker.model.kernels.rounding import BLOCK
from offramp.worker.model.kernels.vectors import (
    F32,
    FLOAT_LANES,
    I8,
    I16,
    I32,
    I64,
    INT_LANES,
    LANES,
    TiledCode,
    int_lanes,
    whole_number,
)

AHEAD = 2048
"""Bytes ahead that weights are asked for."""

LINE = 64
"""Bytes of weights that are read at once: of four inputs and, in the upper bits, of four others."""

_BYTES = ir.VectorType(I8, LINE)
_PAIRS = ir.VectorType(I16, LINE // 2)


class RoundedProduct(TiledCode):
    """Writes the code of one product: numba gives the addresses and sizes.

    Each lane is an output, so that no sum runs over lanes: weights, scales and zero points of
    ``LANES`` outputs lie together (``interleaved``).

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

    def emit(self) -> None:
        """Write the product; the last lanes may be of no output."""
        whole = self.b.and_(self.outputs, whole_number(-LANES))
        every = cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(LANES))
        with every as (o, _):
            self._all_rows(LANES, o)
        with self.b.if_then(self.b.icmp_signed("!=", whole, self.outputs)):
            self._all_rows(1, whole)

    def tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
        """All lanes' sums of some rows, of which ``LANES`` or all that are left are written."""
        sums = [(self.register(), self.register()) for _ in range(rows)]
        x_at = [self.row(self.x, m, k, self.inputs) for k in range(rows)]
        beside_at = [self.row(self.beside, m, k, self.times(self.groups, 12)) for k in range(rows)]
        w_at = self.row(self.weights, o, 0, self.stride)
        groups_at = self.row(self.in_groups, o, 0, self.times(self.groups, 2))
        with cgutils.for_range(self.b, self.groups) as loop:
            here = [self.at(at, loop.index, BLOCK) for at in x_at]
            parts = self._whole_sums(self.at(w_at, loop.index, 4 * LINE), here, beside_at, loop)
            place = self.at(groups_at, loop.index, 2 * LANES)
            scale = self.counted(place, is_signed=False)
            zero = self.counted(self.b.add(place, whole_number(LANES)), is_signed=True)
            for (total, of_zeros), part, at in zip(sums, parts, beside_at, strict=True):
                of_row, summed = (self._of_block(at, loop.index, n, F32) for n in (0, 2))
                both = self.b.fmul(scale, of_row)
                value = self.b.sitofp(part, FLOAT_LANES)
                self.b.store(self.fma(value, both, self.b.load(total)), total)
                self.b.store(self.fma(zero, summed, self.b.load(of_zeros)), of_zeros)
        unit_at = self.row(self.units, o, 0, whole_number(8))
        unit, of_unit = (self.load(self.at(unit_at, whole_number(n), 4), F32) for n in (0, LANES))
        for k, (total, of_zeros) in enumerate(sums):
            value = self.fma(self.b.load(of_zeros), of_unit, self.b.load(total))
            row = self.b.mul(self.b.add(m, whole_number(k)), self.y_stride)
            place = self.at(self.y, self.b.add(row, o), 4)
            self._write(self.b.fmul(value, unit), place, None if outputs == LANES else o)

    def _whole_sums(self, w_at: Any, x_at: Any, beside_at: Any, loop: Any) -> list[Any]:
        """Sum a block's products in whole numbers, row by row; each lane is an output."""
        parts = [self._of_block(at, loop.index, 1, I32) for at in beside_at]
        mask = ir.Constant(_BYTES, [15] * LINE)
        four = ir.Constant(_PAIRS, [4] * (LINE // 2))
        for first in range(0, BLOCK // 2, 4):
            place = self.b.add(w_at, whole_number(first * LANES))
            self.ask_for(self.b.add(place, whole_number(AHEAD)))
            pairs = self.load(place, I8, LINE)
            shifted = self.b.bitcast(self.b.lshr(self.b.bitcast(pairs, _PAIRS), four), _BYTES)
            for bits, offset in ((pairs, first), (shifted, first + BLOCK // 2)):
                weights = self.b.and_(bits, mask)
                for k, at in enumerate(x_at):
                    inputs = self.load(self.b.add(at, whole_number(offset)), I32, lanes=1)
                    parts[k] = self._dot(parts[k], weights, self._everywhere(inputs, I32))
        return parts

    def _of_block(self, beside: Any, block: Any, which: int, kind: Any) -> Any:
        """A block's scale, the start of its sum or its sum, in every lane."""
        place = self.at(beside, block, 4)
        if which:
            place = self.b.add(place, self.times(self.groups, 4 * which))
        return self._everywhere(self.load(place, kind, lanes=1), kind)

    def _everywhere(self, value: Any, kind: Any) -> Any:
        lanes = ir.VectorType(kind, LANES)
        nothing = ir.Constant(lanes, ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, nothing, int_lanes(0))

    def _write(self, value: Any, place: Any, first: Any) -> None:
        """Write all lanes; or, from an output on, as many as there are outputs."""
        if first is None:
            self.b.store(value, self.b.inttoptr(place, FLOAT_LANES.as_pointer()), align=4)
            return
        lanes = cgutils.alloca_once(self.b, FLOAT_LANES)
        self.b.store(value, lanes)
        start = self.b.ptrtoint(lanes, I64)
        with cgutils.for_range(self.b, self.b.sub(self.outputs, first)) as loop:
            one = self.load(self.at(start, loop.index, 4), F32, lanes=1)
            self.b.store(one, self.b.inttoptr(self.at(place, loop.index, 4), F32.as_pointer()))

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


class ByteProduct(RoundedProduct):
    """Writes the product of int8 weights, one scale for each output, with such rows.

    Weights are kept without a sign, 128 more than they are: the instruction wants one side so. The
    sum of a block's row takes that away again.
    """

    def tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
        """All lanes' sums of some rows, of which ``LANES`` or all that are left are written."""
        sums = [self.register() for _ in range(rows)]
        x_at = [self.row(self.x, m, k, self.inputs) for k in range(rows)]
        beside_at = [self.row(self.beside, m, k, self.times(self.groups, 12)) for k in range(rows)]
        w_at = self.row(self.weights, o, 0, self.stride)
        with cgutils.for_range(self.b, self.groups) as loop:
            here = [self.at(at, loop.index, BLOCK) for at in x_at]
            parts = self._whole_sums(self.at(w_at, loop.index, 8 * LINE), here, beside_at, loop)
            for total, part, at in zip(sums, parts, beside_at, strict=True):
                of_row = self._of_block(at, loop.index, 0, F32)
                value = self.b.sitofp(part, FLOAT_LANES)
                self.b.store(self.fma(value, of_row, self.b.load(total)), total)
        scale = self.load(self.at(self.units, o, 4), F32)
        for k, total in enumerate(sums):
            row = self.b.mul(self.b.add(m, whole_number(k)), self.y_stride)
            place = self.at(self.y, self.b.add(row, o), 4)
            value = self.b.fmul(self.b.load(total), scale)
            self._write(value, place, None if outputs == LANES else o)

    def _whole_sums(self, w_at: Any, x_at: Any, beside_at: Any, loop: Any) -> list[Any]:
        four = ir.Constant(INT_LANES, [4] * LANES)  # -8 times a row's sum, times 2^4
        starts = (self._of_block(at, loop.index, 1, I32) for at in beside_at)
        parts = [self.b.shl(start, four) for start in starts]
        for first in range(0, BLOCK, 4):
            place = self.b.add(w_at, whole_number(first * LANES))
            self.ask_for(self.b.add(place, whole_number(AHEAD)))
            weights = self.load(place, I8, LINE)
            for k, at in enumerate(x_at):
                inputs = self.load(self.b.add(at, whole_number(first)), I32, lanes=1)
                parts[k] = self._dot(parts[k], weights, self._everywhere(inputs, I32))
        return parts


LLVM_OF_BYTES = 22
"""From this version of LLVM on, the instruction's operands are vectors of bytes."""


def multiplies_bytes() -> bool:
    """Whether this processor multiplies bytes by fours and adds them up (AVX-512 VNNI)."""
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512f"))
