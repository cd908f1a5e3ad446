"""Numbers as compiled code reads and rounds them: bits of bfloat16, addresses, exponentials.

Shape suffixes: N numbers of any shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def pointer(_: Any, address: Any) -> Any:
    """What lies at an address: to ask torch for it takes a sixth of what a numpy view takes."""

    def to_pointer(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), to_pointer


def _reinterpreted(result: Any, accepted: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
    def cast(_: Any, _value: Any) -> Any:
        def same_bits(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(accepted), same_bits

    return cast


float_of = _reinterpreted(types.float32, types.uint32)
"""The float32 that some bits, uint32, stand for."""

bits_of = _reinterpreted(types.uint32, types.float32)
"""The bits, uint32, of a float32."""


def address_of(part: Tensor | None) -> int:
    """Where a tensor's numbers begin; 0 for none."""
    return 0 if part is None else part.data_ptr()


@compiled
def address(array: Any) -> Any:
    """Where an array's numbers begin; name the array again after they were used, or it is gone."""
    return np.int64(array.ctypes.data)


@compiled
def rounded_bits(value: Any) -> Any:
    """The bits of bfloat16 nearest to a float32, to even between two; NaN stays NaN."""
    bits = bits_of(np.float32(value))
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Counted up, the largest NaN would wrap to 0.
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint32(0x7FC0) if is_nan else np.uint32(nearest)


@compiled
def rounded(value: Any, is_bits: bool) -> Any:
    """A float32, rounded to bfloat16 where that is how activations are kept."""
    return float_of(rounded_bits(value) << np.uint32(16)) if is_bits else np.float32(value)


@compiled
def round_all(values_N: Any, is_bits: bool) -> None:
    """Round numbers in place, where activations are kept in bfloat16."""
    if is_bits:
        for n in range(values_N.size):
            values_N[n] = rounded(values_N[n], True)


@compiled
def read(address: int, is_bits: bool, out_N: Any) -> None:
    """Widen numbers that lie at an address."""
    if is_bits:
        bits_N = carray(pointer(address), out_N.size, np.uint16)
        for n in range(out_N.size):
            out_N[n] = float_of(np.uint32(bits_N[n]) << np.uint32(16))
    else:
        floats_N = carray(pointer(address), out_N.size, np.float32)
        for n in range(out_N.size):
            out_N[n] = floats_N[n]


@compiled
def write(values_N: Any, is_bits: bool, address: int) -> None:
    """Put numbers at an address, rounded to what is kept there."""
    if is_bits:
        bits_N = carray(pointer(address), values_N.size, np.uint16)
        for n in range(values_N.size):
            bits_N[n] = rounded_bits(values_N[n])
    else:
        floats_N = carray(pointer(address), values_N.size, np.float32)
        for n in range(values_N.size):
            floats_N[n] = values_N[n]


@partial(compiled, reorders=False)
def exponential(x: Any) -> Any:
    """The exponential of a float32 as vector code, within two units in the last place.

    2^n times a polynomial over [-ln 2 / 2, ln 2 / 2] (Moshier, Cephes Math Library, expf.c).
    """
    given = np.float32(x)
    x = given if given > np.float32(-87.0) else np.float32(-87.0)
    x = x if x < np.float32(88.0) else np.float32(88.0)
    # Its lowest bits are the whole number n.
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = x - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * r * r + r + np.float32(1.0)
    y = float_of(np.uint32(bits_of(y) + (bits_of(shifted) << np.uint32(23))))
    # The bounds would make a number of NaN.
    return given if given != given else y


@partial(compiled, reorders=False)
def coarse_exponential(x: Any) -> Any:
    """The exponential of a float32 that is 0 at most, exact enough to be rounded to bfloat16.

    PyTorch's attention takes the same for bfloat16 on x86; another would round to other weights.
    2^n (2^f) with a cubic for 2^f - f - 1 (Malossi, Ineichen, Bekas, Curioni, Fast Exponential
    Computation on SIMD Architectures, 2015, section 3).
    """
    given = np.float32(x)
    power = given * np.float32(1.44269504)
    f = power - np.floor(power)
    cubic = np.float32(-0.079204240219773236) * f + np.float32(-0.22433836478672356)
    cubic = cubic * f + np.float32(0.30354260500649682)
    cubic = cubic * f + np.float32(0.00010703434948458272)
    bits = (power - cubic) * np.float32(1 << 23) + np.float32(127 << 23)
    value = float_of(np.uint32(np.int32(bits)))
    value = np.float32(0) if given < np.float32(-87.33654) else value
    return given if given != given else value
