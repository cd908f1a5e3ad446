"""Products of few rows with a matrix, in whatever form its weights are kept: compiled vector code.

Every sum runs over the inputs in one order, whatever number of rows is multiplied together: a row's
bits depend on nothing but the row. Weights come from memory once, for few rows (but of int4) in the
order in which they lie, are widened in registers, and asked for ahead of time, which is what brings
one row near the speed of memory.

Shape suffixes: O outputs, I inputs, M rows, G groups of an output's weights.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from offramp.controller.policies.net_kernel import kept_on_disk
from offramp.worker.model.kernels.rounded import ByteProduct, RoundedProduct
from offramp.worker.model.kernels.tiles import TileProduct
from offramp.worker.model.kernels.vectors import (
    F32,
    FLOAT_LANES,
    I8,
    I16,
    I64,
    INT_LANES,
    LANES,
    TiledCode,
    int_lanes,
    whole_number,
)

BITS, FLOATS, INT8, INT4, TILES, ROUNDED, BYTES = range(7)
"""How weights are kept: bits of bfloat16, float32, int8 with a scale per output, int4 in groups;
bits of bfloat16 that fill the processor's tiles; last, int4 and int8 for rows in whole numbers."""

LINE = 64
"""Bytes that memory hands over at once."""

BLOCK = 32
"""Neighbouring int4 weights that 16 bytes keep: the first half in their lower four bits."""

AHEAD = 2
"""Tiles ahead that int4's weights are asked for: so few bytes are read before memory answers."""

STREAM_AHEAD = 2048
"""Bytes ahead that weights are asked for which are read in the order in which they lie."""

ONE = 0x3F800000
"""The bits of 1."""

_ELEMENTS = {BITS: I16, FLOATS: F32, INT8: I8}
_BYTES = {BITS: 2, FLOATS: 4, INT8: 1}

_STREAMED = {FLOATS: 8, BITS: 4, INT8: 4, INT4: 0}
"""See ``TiledCode``: the longer unpacking takes, the sooner several outputs at once gain."""


class _Product(TiledCode):
    """Writes the code of one product: numba gives the addresses and sizes, LLVM the registers."""

    def __init__(self, builder: Any, kind: int, arguments: Any) -> None:
        super().__init__(builder)
        self.kind = kind
        self.streamed = _STREAMED[kind]
        (
            self.weights, self.stride, self.scales, self.in_groups, self.group, self.outputs,
            self.inputs, self.x, self.sums, self.rows, self.y, self.y_stride,
        ) = arguments  # fmt: skip

    def outputs_at_once(self, outputs: int) -> int:
        """All but for int4, which needs two registers per sum: more at once would spill."""
        return min(outputs, 2) if self.kind == INT4 else outputs

    def tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
        """Sums of some outputs of some rows, which start at o and m."""
        sums = [[self.register() for _ in range(rows)] for _ in range(outputs)]
        w_at = [self.row(self.weights, o, k, self.stride) for k in range(outputs)]
        x_at = [self.row(self.x, m, k, self.times(self.inputs, 4)) for k in range(rows)]
        if self.kind == INT4:
            self._sum_groups(sums, w_at, x_at, o, m)
        else:
            self._sum_columns(sums, w_at, x_at)
        for k, of_output in enumerate(sums):
            for j, total in enumerate(of_output):
                row = self.b.mul(self.b.add(m, whole_number(j)), self.y_stride)
                column = self.b.add(o, whole_number(k))
                value = self.total(self.b.load(total))
                if self.kind in (INT8, INT4):
                    size = 4 if self.kind == INT8 else 8
                    scale = self.load(self.at(self.scales, column, size), F32, lanes=1)
                    value = self.b.fmul(value, scale)
                place = self.at(self.y, self.b.add(row, column), 4)
                self.b.store(value, self.b.inttoptr(place, F32.as_pointer()))

    def _sum_columns(self, sums: Any, w_at: Any, x_at: Any) -> None:
        """Whole lines of memory first, then what is left in vectors, then in single columns."""
        size = _BYTES[self.kind]
        step = LINE // size
        lines = self.b.and_(self.inputs, whole_number(-step))
        vectors = self.b.and_(self.inputs, whole_number(-LANES))
        with cgutils.for_range_slice(self.b, whole_number(0), lines, whole_number(step)) as (i, _):
            self._ask_ahead(w_at, self.times(i, size))
            for first in range(0, step, LANES):
                self._add_vectors(sums, w_at, x_at, self.b.add(i, whole_number(first)))
        with cgutils.for_range_slice(self.b, lines, vectors, whole_number(LANES)) as (i, _):
            self._add_vectors(sums, w_at, x_at, i)
        with cgutils.for_range_slice(self.b, vectors, self.inputs, whole_number(1)) as (i, _):
            self._add_vectors(sums, w_at, x_at, i, lanes=1)

    def _add_vectors(self, sums: Any, w_at: Any, x_at: Any, i: Any, lanes: int = LANES) -> None:
        xs = [self.spread(self.load(self.at(row, i, 4), F32, lanes)) for row in x_at]
        for of_output, row in zip(sums, w_at, strict=True):
            kept = self.load(self.at(row, i, _BYTES[self.kind]), _ELEMENTS[self.kind], lanes)
            weights = self._weights(self.spread(kept))
            for total, x in zip(of_output, xs, strict=True):
                self.b.store(self.fma(weights, x, self.b.load(total)), total)

    def _sum_groups(self, sums: Any, w_at: Any, x_at: Any, o: Any, m: Any) -> None:
        """Each group's numbers by its scale; then what the rows' own sums add (``weighted``)."""
        groups = self.b.sdiv(self.inputs, self.group)
        scales_at = [
            self.row(self.in_groups, o, k, self.times(groups, 2)) for k in range(len(w_at))
        ]
        zeros_at = [self.b.add(at, groups) for at in scales_at]
        units = [self.unit_of_zeros(self.scales, o, k) for k in range(len(w_at))]
        parts = [[self.register() for _ in of_output] for of_output in sums]
        with cgutils.for_range(self.b, groups) as loop:
            first = self.b.mul(loop.index, self.group)
            self._ask_ahead(w_at, self.b.sdiv(first, whole_number(2)))
            self._add_block(parts, w_at, x_at, first, begins=True)
            end = self.b.add(first, self.group)
            second = self.b.add(first, whole_number(BLOCK))
            with cgutils.for_range_slice(self.b, second, end, whole_number(BLOCK)) as (i, _):
                self._add_block(parts, w_at, x_at, i, begins=False)
            for scales, of_output, of_parts in zip(scales_at, sums, parts, strict=True):
                scale = self.splat(self._count(self.b.add(scales, loop.index)))
                for total, part in zip(of_output, of_parts, strict=True):
                    self.b.store(self.fma(self.b.load(part), scale, self.b.load(total)), total)
        # Beyond a row's groups lie the next one's; the rows' sums are 0 there.
        padded = self.b.and_(self.b.add(groups, whole_number(LANES - 1)), whole_number(-LANES))
        sums_at = [self.row(self.sums, m, k, self.times(padded, 8)) for k in range(len(x_at))]
        every = cgutils.for_range_slice(self.b, whole_number(0), padded, whole_number(LANES))
        with every as (g, _):
            by_scale = [self.load(self.at(row, g, 4), F32) for row in sums_at]
            behind = self.b.add(g, padded)
            by_zero = [self.load(self.at(row, behind, 4), F32) for row in sums_at]
            for scales, zeros, unit, of_output in zip(
                scales_at, zeros_at, units, sums, strict=True
            ):
                scale = self.counted(self.b.add(scales, g), is_signed=False)
                zero = self.b.fmul(self.counted(self.b.add(zeros, g), is_signed=True), unit)
                for total, one, other in zip(of_output, by_scale, by_zero, strict=True):
                    summed = self.fma(scale, one, self.b.load(total))
                    self.b.store(self.fma(zero, other, summed), total)

    def _count(self, place: Any) -> Any:
        """A whole number of 8 bits as float32: a table is faster than conversion."""
        table = ir.Constant(ir.ArrayType(F32, 256), [float(n) for n in range(256)])
        counts = cgutils.global_constant(self.b.module, "counts", table)
        number = self.b.zext(self.load(place, I8, lanes=1), I64)
        return self.b.load(self.b.gep(counts, [whole_number(0), number], inbounds=True))

    def _add_block(self, parts: Any, w_at: Any, x_at: Any, i: Any, *, begins: bool) -> None:
        """Sum numbers without converting them: their bits become the first ones behind a 1.

        A number q of the lower bits reads 1 + q / 256 then, one of the upper bits 1 + q / 16.
        """
        xs = [[self.load(self.at(row, i, 4, n), F32) for n in (0, LANES)] for row in x_at]
        for of_output, row in zip(parts, w_at, strict=True):
            at = self.b.add(row, self.b.sdiv(i, whole_number(2)))
            pairs = self.b.shl(self.b.zext(self.load(at, I8), INT_LANES), int_lanes(15))
            low, high = (
                self.b.bitcast(
                    self.b.or_(self.b.and_(pairs, int_lanes(bits)), int_lanes(ONE)), FLOAT_LANES
                )
                for bits in (15 << 15, 15 << 19)
            )
            for part, (x_low, x_high) in zip(of_output, xs, strict=True):
                if begins:
                    summed = self.b.fmul(low, x_low)
                else:
                    summed = self.fma(low, x_low, self.b.load(part))
                self.b.store(self.fma(high, x_high, summed), part)

    def _ask_ahead(self, w_at: Any, column: Any) -> None:
        """Let memory hand over what the next tiles soon read."""
        if self.streamed and len(w_at) == 1:
            ahead = self.b.add(column, whole_number(STREAM_AHEAD))
        else:
            tiles = AHEAD if self.kind == INT4 else 1
            ahead = self.b.add(column, self.times(self.stride, len(w_at) * tiles))
        for row in w_at:
            self.ask_for(self.b.add(row, ahead))

    def _weights(self, kept: Any) -> Any:
        if self.kind == BITS:
            return self.widened(kept)
        if self.kind == INT8:
            return self.b.sitofp(self.b.sext(kept, INT_LANES), FLOAT_LANES)
        return kept


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]  # numba is untyped
def _product_of(_: Any, kind: Any, arguments: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        given = cgutils.unpack_tuple(builder, values[1])
        if kind.literal_value == TILES:
            TileProduct(builder, given).emit()
        elif kind.literal_value == ROUNDED:
            RoundedProduct(builder, given).emit()
        elif kind.literal_value == BYTES:
            ByteProduct(builder, given).emit()
        else:
            _Product(builder, kind.literal_value, given).emit()
        return context.get_dummy_value()

    return types.void(kind, arguments), emit


@lru_cache
def code_for(kind: int) -> int:
    """Address of the code that multiplies rows with one kind of weights: y = x Wᵀ.

    ``call_code`` calls it, with a tuple of:

        weights: Address of the matrix [O, I], its inputs side by side.
        stride: Bytes from one output's weights to the next one's.
        scales: Address of int8's scales [O], or int4's units [O, 2], float32; see ``KernelMatrix``.
        groups: Address of int4's scales and zero points [O, 2, G], of 8 bits. Behind them, what
            fills up a vector is read, too.
        group: Inputs that share one of int4's scales.
        outputs, inputs: Sizes of the matrix.
        x: Address of the rows [M, I], float32; for int4 as ``weighted`` leaves them.
        sums: Address of what ``weighted`` sums of each row; for tiles of the rows as ``packed``.
        rows: Number of rows.
        y: Address of what is written, float32.
        y_stride: Numbers from one row of it to the next.
    """

    def product(
        weights: int,
        stride: int,
        scales: int,
        groups: int,
        group: int,
        outputs: int,
        inputs: int,
        x: int,
        sums: int,
        rows: int,
        y: int,
        y_stride: int,
    ) -> None:
        arguments = (
            weights, stride, scales, groups, group, outputs, inputs, x, sums, rows, y, y_stride
        )  # fmt: skip
        _product_of(kind, arguments)

    code = kept_on_disk(partial(cfunc, types.void(*[types.int64] * 12)), product)
    _COMPILED.append(code)
    return int(code.address)


_COMPILED: list[Any] = []
"""Keeps code alive whose addresses were given away."""
