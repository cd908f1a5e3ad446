"""The candidate probe's arithmetic for one row, its policy's included, compiled.

Shape suffixes: K candidates, D width, H hidden units, V vocabulary, F features, J followers; 1 the
row, 2 a norm's weight and bias, 4 what is remembered of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from offramp.controller.net_kernel import compiled, outputs_of
from offramp.worker.merging import merge_row
from offramp.worker.probes.kernel import begin, candidate_features


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    """What lies at an address: to ask torch for it takes a sixth of what a numpy view takes."""

    def to_pointer(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), to_pointer


@compiled
def row_features(
    head_VD: Any,
    candidates_1K: Any,
    address: int,
    norm_2D: Any,
    eps: float,
    is_centred: bool,
    last_1D: Any,
    memory_14: Any,
    place_1: Any,
    depth: float,
    exits: int,
    are_bits: tuple[bool, bool],
) -> Any:
    """CANDIDATES_V1 of one row, [1, F], its state given by the address of D numbers.

    Args:
        address: Of float32 or, if ``are_bits`` says so, of bfloat16 numbers.
        head_VD, candidates_1K, norm_2D, eps, is_centred, last_1D, memory_14, place_1, depth,
            exits, are_bits: As ``candidate_features`` takes them.
    """
    if are_bits[1]:
        return candidate_features(
            head_VD, candidates_1K, carray(_pointer(address), last_1D.shape, np.uint16), norm_2D,
            eps, is_centred, last_1D, memory_14, place_1, depth, exits, are_bits,
        )  # fmt: skip
    return candidate_features(
        head_VD, candidates_1K, carray(_pointer(address), last_1D.shape, np.float32), norm_2D,
        eps, is_centred, last_1D, memory_14, place_1, depth, exits, are_bits,
    )  # fmt: skip


@compiled
def row_logit(
    head_VD: Any,
    candidates_1K: Any,
    address: int,
    norm_2D: Any,
    eps: float,
    is_centred: bool,
    last_1D: Any,
    memory_14: Any,
    place_1: Any,
    depth: float,
    exits: int,
    are_bits: tuple[bool, bool],
    flat: Any,
    sizes: Any,
) -> float:
    """The logit of an ``MlpPolicy`` that reads the features of one row; NaN if they are unusable.

    Several rows are better decided in numpy, whose tanh is vectorised.

    Args:
        head_VD, candidates_1K, address, norm_2D, eps, is_centred, last_1D, memory_14, place_1,
            depth, exits, are_bits: As ``row_features`` takes them.
        flat, sizes: The policy's weights.
    """
    features_1F = row_features(
        head_VD, candidates_1K, address, norm_2D, eps, is_centred, last_1D, memory_14, place_1,
        depth, exits, are_bits,
    )  # fmt: skip
    return float(outputs_of(features_1F[0], flat, sizes)[0])


@compiled
def begin_row(
    table_VK: Any,
    last: int,
    followers_J: Any,
    address: int,
    is_bits: bool,
    candidates_1K: Any,
    last_1D: Any,
    memory_14: Any,
) -> None:
    """All that a probe of one row starts from, in one go; the last three are written.

    Args:
        table_VK: The successor table.
        last: The row's last token.
        followers_J: Its own candidates.
        address: Of its embedding, float32 or bits.
        is_bits: Which.
        candidates_1K: What to score.
        last_1D: The state of the last probe.
        memory_14: See BEST and its neighbours.
    """
    merge_row(table_VK[last], followers_J, candidates_1K[0])
    if is_bits:
        begin(
            carray(_pointer(address), last_1D.shape[1], np.uint16), True, last_1D[0], memory_14[0]
        )
    else:
        begin(
            carray(_pointer(address), last_1D.shape[1], np.float32), False, last_1D[0], memory_14[0]
        )
