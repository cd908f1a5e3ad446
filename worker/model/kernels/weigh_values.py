"""The second product of attention: rows of values added up by weights, as compiled vector code.

Sums run over positions in order and stay in registers meanwhile.

Shape suffixes: Q query heads of one key head, P positions, H head_dim.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from offramp.controller.policies.net_kernel import kept_on_disk
from offramp.worker.model.kernels.vectors import F32, I16, LANES, VectorCode, whole_number

HEADS = 4
"""Query heads, and vectors of a row of values, whose sums are kept in registers together."""


class _ValueSum(VectorCode):
    """Writes y += weights · values."""

    def __init__(self, builder: Any, is_bits: bool, arguments: Any) -> None:
        super().__init__(builder)
        self.element = I16 if is_bits else F32
        (
            self.values, self.row_bytes, self.weights, self.weights_stride, self.positions,
            self.y, self.heads, self.width,
        ) = arguments  # fmt: skip

    def emit(self) -> None:
        """All query heads, some at a time, each over all columns of the values."""
        whole = self.b.and_(self.heads, whole_number(-HEADS))
        with cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(HEADS)) as (q, _):
            self._all_columns(HEADS, q)
        for count, first in ((2, whole), (1, self.b.and_(self.heads, whole_number(-2)))):
            bit = self.b.and_(self.heads, whole_number(count))
            with self.b.if_then(self.b.icmp_signed("!=", bit, whole_number(0))):
                self._all_columns(count, first)

    def _all_columns(self, heads: int, q: Any) -> None:
        done = whole_number(0)
        for vectors, lanes in ((HEADS, LANES), (1, LANES), (1, 1)):
            end = self.b.and_(self.width, whole_number(-vectors * lanes))
            step = whole_number(vectors * lanes)
            with cgutils.for_range_slice(self.b, done, end, step) as (h, _):
                self._sum(heads, vectors, lanes, q, h)
            done = end

    def _sum(self, heads: int, vectors: int, lanes: int, q: Any, h: Any) -> None:
        """Some heads' sums of neighbouring columns, which start at q and h."""
        size = 2 if self.element is I16 else 4
        y_at = [self.row(self.y, q, k, self.times(self.width, 4)) for k in range(heads)]
        w_at = [
            self.row(self.weights, q, k, self.times(self.weights_stride, 4)) for k in range(heads)
        ]
        sums = [[self.register() for _ in range(vectors)] for _ in range(heads)]
        for row, of_head in zip(y_at, sums, strict=True):
            for n, total in enumerate(of_head):
                begun = self.load(self.at(row, h, 4, n * lanes), F32, lanes)
                self.b.store(self.spread(begun), total)
        with cgutils.for_range(self.b, self.positions) as loop:
            row = self.b.add(self.values, self.b.mul(loop.index, self.row_bytes))
            kept = [
                self.spread(self.load(self.at(row, h, size, n * lanes), self.element, lanes))
                for n in range(vectors)
            ]
            if self.element is I16:
                kept = [self.widened(each) for each in kept]
            for place, of_head in zip(w_at, sums, strict=True):
                weight = self.splat(self.load(self.at(place, loop.index, 4), F32, lanes=1))
                for total, value in zip(of_head, kept, strict=True):
                    self.b.store(self.fma(weight, value, self.b.load(total)), total)
        for row, of_head in zip(y_at, sums, strict=True):
            for n, total in enumerate(of_head):
                self._store(self.b.load(total), self.at(row, h, 4, n * lanes), lanes)

    def _store(self, total: Any, place: Any, lanes: int) -> None:
        if lanes == 1:
            total = self.b.extract_element(total, whole_number(0))
        pointer = self.b.inttoptr(place, total.type.as_pointer())
        self.b.store(total, pointer, align=4)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]  # numba is untyped
def _value_sum_of(_: Any, is_bits: Any, arguments: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        given = cgutils.unpack_tuple(builder, values[1])
        _ValueSum(builder, bool(is_bits.literal_value), given).emit()
        return context.get_dummy_value()

    return types.void(is_bits, arguments), emit


@lru_cache
def value_code_for(is_bits: int) -> int:
    """Address of the code that weighs values of bfloat16 (1) or float32 (0); see ``call_code``.

    It takes the address of the values [P, H] and the bytes from one row to the next; the address
    of weights [Q, P], float32, and the numbers from one row to the next; P; the address of what is
    added to, [Q, H] float32; Q, and H.
    """

    def weigh_values(
        values: int,
        row_bytes: int,
        weights: int,
        weights_stride: int,
        positions: int,
        y: int,
        heads: int,
        width: int,
    ) -> None:
        arguments = (values, row_bytes, weights, weights_stride, positions, y, heads, width)
        _value_sum_of(is_bits, arguments)

    code = kept_on_disk(partial(cfunc, types.void(*[types.int64] * 8)), weigh_values)
    _COMPILED.append(code)
    return int(code.address)


_COMPILED: list[Any] = []
"""Keeps code alive whose addresses were given away."""
