"""Vector instructions as LLVM knows them, for code that numba would not vectorise as it should."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
"""Values that are multiplied at once."""

TILE = 4
"""Outputs, and rows, whose sums are kept in registers together."""

F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(n) for n in (8, 16, 32, 64))
FLOAT_LANES = ir.VectorType(F32, LANES)
INT_LANES = ir.VectorType(I32, LANES)
ZEROS = ir.Constant(FLOAT_LANES, [0.0] * LANES)


class VectorCode:
    """Writes instructions of one function.

    Args:
        builder: numba's, at the place where the code goes.
    """

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def ask_for(self, place: Any, near: int = 3) -> None:
        """Let memory hand over what lies at an address."""
        signature = ir.FunctionType(ir.VoidType(), (I8.as_pointer(), I32, I32, I32))
        ask = cgutils.get_or_insert_function(self.b.module, signature, "llvm.prefetch.p0i8")
        # To read, into every cache, data.
        how = [ir.Constant(I32, n) for n in (0, near, 1)]
        self.b.call(ask, (self.b.inttoptr(place, I8.as_pointer()), *how))

    def load(self, place: Any, element: Any, lanes: int = LANES) -> Any:
        """A vector, or a single value, at an address that need not be aligned."""
        kind = element if lanes == 1 else ir.VectorType(element, lanes)
        size = 4 if element is F32 else element.width // 8
        return self.b.load(self.b.inttoptr(place, kind.as_pointer()), align=size)

    def spread(self, loaded: Any) -> Any:
        """A single value as a vector whose other lanes are 0."""
        if isinstance(loaded.type, ir.VectorType):
            return loaded
        zeros = ir.Constant(ir.VectorType(loaded.type, LANES), None)
        return self.b.insert_element(zeros, loaded, ir.Constant(I32, 0))

    def widened(self, bits: Any) -> Any:
        """What a vector of bits of bfloat16 stands for."""
        wide = self.b.shl(self.b.zext(bits, INT_LANES), int_lanes(16))
        return self.b.bitcast(wide, FLOAT_LANES)

    def counted(self, place: Any, *, is_signed: bool) -> Any:
        """Whole numbers of 8 bits at an address, as float32."""
        kept = self.load(place, I8)
        extended = self.b.sext(kept, INT_LANES) if is_signed else self.b.zext(kept, INT_LANES)
        return self.b.sitofp(extended, FLOAT_LANES)

    def unit_of_zeros(self, units: Any, first: Any, offset: int) -> Any:
        """How many units of an int4 output's scales make one of its zero points, in every lane."""
        place = self.b.add(self.row(units, first, offset, whole_number(8)), whole_number(4))
        return self.splat(self.load(place, F32, lanes=1))

    def splat(self, value: Any) -> Any:
        """A value in every lane."""
        first = self.b.insert_element(
            ir.Constant(FLOAT_LANES, ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.b.shuffle_vector(first, ir.Constant(FLOAT_LANES, ir.Undefined), int_lanes(0))

    def total(self, lanes: Any) -> Any:
        """The sum of all lanes, halves by halves."""
        count = LANES
        while count > 1:
            count //= 2
            low, high = (
                self.b.shuffle_vector(
                    lanes,
                    lanes,
                    ir.Constant(ir.VectorType(I32, count), list(range(first, first + count))),
                )
                for first in (0, count)
            )
            lanes = self.b.fadd(low, high)
        return self.b.extract_element(lanes, ir.Constant(I32, 0))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z, rounded once."""
        signature = ir.FunctionType(FLOAT_LANES, (FLOAT_LANES,) * 3)
        name = f"llvm.fma.v{LANES}f32"
        fma = cgutils.get_or_insert_function(self.b.module, signature, name)
        return self.b.call(fma, (x, y, z))

    def register(self) -> Any:
        """A vector of sums, 0 at first."""
        register = cgutils.alloca_once(self.b, FLOAT_LANES)
        self.b.store(ZEROS, register)
        return register

    def row(self, base: Any, first: Any, offset: int, stride: Any) -> Any:
        """The address of a row: some rows after another one."""
        return self.b.add(base, self.b.mul(self.b.add(first, whole_number(offset)), stride))

    def at(self, base: Any, index: Any, size: int, offset: int = 0) -> Any:
        """The address of an item of so many bytes."""
        return self.b.add(base, self.times(self.b.add(index, whole_number(offset)), size))

    def times(self, value: Any, factor: int) -> Any:
        """A number times a constant."""
        return self.b.mul(value, whole_number(factor))


class TiledCode(VectorCode):
    """Writes all outputs of a product by tiles, each over all rows.

    So a tile's weights stay in the first cache, and its sums in registers. A subclass has the
    numbers of ``outputs`` and ``rows``, and writes one tile.

    Attributes:
        streamed: Up to so many rows outputs are taken one by one: weights are then read in the
            order in which they lie, which an AMD EPYC was seen to do at up to three times the speed
            of four outputs' side by side. 0, or a power of two that is not below ``TILE``.
    """

    outputs: Any
    rows: Any
    streamed = 0

    def emit(self) -> None:
        """Write the product."""
        whole = self.b.and_(self.outputs, whole_number(-TILE))
        few = self.b.icmp_signed("<=", self.rows, whole_number(self.streamed))
        whole = self.b.select(few, whole_number(0), whole)
        with cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(TILE)) as (o, _):
            self._all_rows(TILE, o)
        with cgutils.for_range_slice(self.b, whole, self.outputs, whole_number(1)) as (o, _):
            self._all_rows(1, o)

    def tile(self, outputs: int, rows: int, o: Any, m: Any) -> None:
        """Write sums of some outputs of some rows, which start at o and m."""
        raise NotImplementedError

    def outputs_at_once(self, outputs: int) -> int:
        """How many outputs of a tile have registers beside ``TILE`` rows."""
        return outputs

    def _all_rows(self, outputs: int, o: Any) -> None:
        most = max(self.streamed, TILE) if outputs == 1 else TILE
        whole = self.b.and_(self.rows, whole_number(-most))
        with cgutils.for_range_slice(self.b, whole_number(0), whole, whole_number(most)) as (m, _):
            step = self.outputs_at_once(outputs)
            for first in range(0, outputs, step):
                self.tile(step, most, self.b.add(o, whole_number(first)), m)
        for power in reversed(range(most.bit_length() - 1)):
            count = 1 << power
            bit = self.b.and_(self.rows, whole_number(count))
            with self.b.if_then(self.b.icmp_signed("!=", bit, whole_number(0))):
                first = self.b.and_(self.rows, whole_number(-2 * count))
                self.tile(outputs, count, o, first)


def whole_number(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def int_lanes(value: int) -> Any:
    """A vector of one constant."""
    return ir.Constant(INT_LANES, [value] * LANES)
