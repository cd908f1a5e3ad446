"""Products with weights of bfloat16 in the processor's tiles (Intel AMX), for any few rows.

A tile instruction multiplies 16 outputs' weights over 32 inputs with up to 16 rows at once, so that
16 rows take no longer than one: weights come from memory no faster. Weights are read as they lie;
rows are laid out in pairs of inputs (``packed``). Sums run over the inputs in order, in float32,
whatever number of rows is multiplied together.

Shape suffixes: M rows, I inputs, W rows of a tile, P pairs of inputs.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import bits_of, float_of
from offramp.worker.model.kernels.vectors import F32, I8, I64, VectorCode, whole_number

SIDE = 16
"""Outputs, and rows at most, of a tile."""

DEPTH = 32
"""Inputs that a tile instruction takes at once."""

PAIR_BYTES = 4

REQUEST_PERMISSION, TILE_DATA = 0x1023, 18
"""Numbers of Linux: ``ARCH_REQ_XCOMP_PERM`` of arch_prctl, and the state that is asked for."""

ARCH_PRCTL = 158
"""Number of that system call on x86-64."""

_SUMS, _WEIGHTS, _ROWS = (0, 1), (2, 3), 4
"""The tile registers, of which two take outputs side by side."""


@cache
def has_tiles() -> bool:
    """Whether the processor has tiles of bfloat16 and Linux lets this process use them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


def fits_tiles(outputs: int, inputs: int) -> bool:
    """Whether a matrix of bfloat16 fills tiles."""
    return outputs >= SIDE and inputs % DEPTH == 0


@compiled
def packed(x_MI: Any) -> Any:
    """Rows of bfloat16 in float32 as tiles take them, [blocks of rows, P, W].

    A number holds the bits of two neighbouring inputs of a row. More rows than a tile has are cut
    into blocks, the last one filled up with 0.
    """
    rows, inputs = x_MI.shape
    width = min(rows, SIDE)
    packed_BPW = np.zeros((-(-rows // SIDE), inputs // 2, width), np.float32)
    for m in range(rows):
        block, place = m // SIDE, m % SIDE
        for p in range(inputs // 2):
            low = bits_of(x_MI[m, 2 * p]) >> np.uint32(16)
            high = bits_of(x_MI[m, 2 * p + 1]) & np.uint32(0xFFFF0000)
            packed_BPW[block, p, place] = float_of(np.uint32(low | high))
    return packed_BPW


class TileProduct(VectorCode):
    """Writes the code of one product: numba gives the addresses and sizes.

    Args:
        builder: numba's, at the place where the code goes.
        arguments: See ``code_for``; ``sums`` is what ``packed`` gave.
    """

    def __init__(self, builder: Any, arguments: Any) -> None:
        super().__init__(builder)
        (
            self.weights, self.stride, _, _, _, self.outputs,
            self.inputs, _, self.packed, self.rows, self.y, self.y_stride,
        ) = arguments  # fmt: skip
        few = builder.icmp_signed("<", self.rows, whole_number(SIDE))
        self.width = builder.select(few, self.rows, whole_number(SIDE))
        self.line = self.times(self.width, PAIR_BYTES)
        self._scratch = cgutils.alloca_once(builder, ir.ArrayType(F32, SIDE * SIDE))

    def emit(self) -> None:
        """All outputs, two tiles at a time; the last tile may repeat some of the one before."""
        self._configure()
        pairs = self.b.and_(self.outputs, whole_number(-2 * SIDE))
        every = cgutils.for_range_slice(self.b, whole_number(0), pairs, whole_number(2 * SIDE))
        with every as (o, _):
            self._all_rows(2, o)
        with self._if_any(SIDE):
            self._all_rows(1, pairs)
        with self._if_any(SIDE - 1):
            self._all_rows(1, self.b.sub(self.outputs, whole_number(SIDE)))
        self._call("llvm.x86.tilerelease")

    def _all_rows(self, count: int, o: Any) -> None:
        """Every block of rows, while the outputs' weights are in the caches."""
        blocks = self.b.sdiv(self.b.add(self.rows, whole_number(SIDE - 1)), whole_number(SIDE))
        with cgutils.for_range(self.b, blocks) as loop:
            self._tiles(count, o, loop.index)

    def _if_any(self, bits: int) -> Any:
        left = self.b.and_(self.outputs, whole_number(bits))
        return self.b.if_then(self.b.icmp_signed("!=", left, whole_number(0)))

    def _configure(self) -> None:
        """Say how many rows, and bytes of a row, each tile has."""
        place = cgutils.alloca_once(self.b, ir.ArrayType(I8, 64))
        self.b.store(ir.Constant(ir.ArrayType(I8, 64), None), place)
        start = self.b.ptrtoint(place, I64)
        self._put(start, 0, whole_number(1))
        line = self.b.trunc(self.line, I8)
        for tile in (*_SUMS, *_WEIGHTS, _ROWS):
            wide = whole_number(2 * DEPTH) if tile in _WEIGHTS else line
            self._put(start, 16 + 2 * tile, wide)
            self._put(start, 48 + tile, whole_number(SIDE))
        self._call("llvm.x86.ldtilecfg", self._pointer(start))

    def _tiles(self, count: int, o: Any, block: Any) -> None:
        """The sums of some tiles of outputs, which start at o, for a block of rows."""
        w_at = [self.row(self.weights, o, SIDE * t, self.stride) for t in range(count)]
        bytes_of_block = self.b.mul(self.b.sdiv(self.inputs, whole_number(2)), self.line)
        x_at = self.b.add(self.packed, self.b.mul(block, bytes_of_block))
        for t in range(count):
            self._call("llvm.x86.tilezero", self._tile(_SUMS[t]))
        every = cgutils.for_range_slice(self.b, whole_number(0), self.inputs, whole_number(DEPTH))
        with every as (i, _):
            pair = self.b.sdiv(i, whole_number(2))
            self._load(_ROWS, self.b.add(x_at, self.b.mul(pair, self.line)), self.line)
            for t, row in enumerate(w_at):
                place = self.at(row, i, 2)
                self._load(_WEIGHTS[t], place, self.stride)
                tiles = (self._tile(n) for n in (_SUMS[t], _WEIGHTS[t], _ROWS))
                self._call("llvm.x86.tdpbf16ps", *tiles)
                ahead = self.b.add(place, self.times(self.stride, SIDE * count))
                for k in range(SIDE):
                    self.ask_for(self.b.add(ahead, self.times(self.stride, k)), 2)
        for t in range(count):
            self._write(_SUMS[t], self.b.add(o, whole_number(SIDE * t)), block)

    def _write(self, tile: int, o: Any, block: Any) -> None:
        """Put a tile of sums, an output per row, where the rows' outputs are."""
        with self.b.if_else(self.b.icmp_signed("==", self.rows, whole_number(1))) as (one, several):
            with one:
                self._store(tile, self.at(self.y, o, 4), whole_number(4))
            with several:
                self._turn(tile, o, block)

    def _turn(self, tile: int, o: Any, block: Any) -> None:
        """The same for several rows: outputs of a row lie side by side there."""
        start = self.b.ptrtoint(self._scratch, I64)
        self._store(tile, start, self.line)
        first = self.times(block, SIDE)
        left = self.b.sub(self.rows, first)
        some = self.b.icmp_signed("<", left, whole_number(SIDE))
        with cgutils.for_range(self.b, self.b.select(some, left, whole_number(SIDE))) as loop:
            row = self.b.mul(self.b.add(first, loop.index), self.y_stride)
            for k in range(SIDE):
                at = self.b.add(self.b.mul(self.width, whole_number(k)), loop.index)
                value = self.load(self.at(start, at, 4), F32, lanes=1)
                place = self.at(self.y, self.b.add(row, self.b.add(o, whole_number(k))), 4)
                self.b.store(value, self.b.inttoptr(place, F32.as_pointer()))

    def _store(self, tile: int, place: Any, stride: Any) -> None:
        self._call("llvm.x86.tilestored64", self._tile(tile), self._pointer(place), stride)

    def _load(self, tile: int, place: Any, stride: Any) -> None:
        self._call("llvm.x86.tileloadd64", self._tile(tile), self._pointer(place), stride)

    def _put(self, start: Any, offset: int, value: Any) -> None:
        """Write one byte of the configuration."""
        byte = value if value.type == I8 else self.b.trunc(value, I8)
        self.b.store(byte, self._pointer(self.b.add(start, whole_number(offset))))

    def _pointer(self, place: Any) -> Any:
        return self.b.inttoptr(place, I8.as_pointer())

    def _tile(self, number: int) -> Any:
        return ir.Constant(I8, number)

    def _call(self, name: str, *arguments: Any) -> None:
        signature = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
        self.b.call(cgutils.get_or_insert_function(self.b.module, signature, name), arguments)
