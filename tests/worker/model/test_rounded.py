"""Rows in whole numbers, their products, and the shortlist that they make worth its while.

Shape suffixes: N rows, I inputs, O outputs, D width, V vocabulary, P numbers of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import nn

from offramp.worker.model.kernels import rounded as rounded_kernel
from offramp.worker.model.kernels.matrix import (
    GROUP,
    GROUPS,
    INPUTS,
    OUTPUTS,
    SCALES,
    STRIDE,
    WEIGHTS,
    weighted,
)
from offramp.worker.model.kernels.rounding import rounded_rows
from offramp.worker.model.kernels.shortlist import LISTED, Shortlist, likeliest
from offramp.worker.model.quantised import Int4Weight
from support.kernels import matrix_of, numbers


def test_rows_round_to_the_whole_numbers_of_their_blocks() -> None:
    x_NI = numbers(4, 96) * torch.exp(4 * numbers(4, 96, seed=1))
    x_NI[1, :32], x_NI[2, 40], x_NI[3, 70] = 0, float("nan"), float("inf")
    x_NI[3, :32] = 1e-31
    rounded = rounded_rows(x_NI)
    largest = x_NI.view(4, 3, 32).abs().amax(-1, keepdim=True)
    unit = torch.exp2(largest.log2().floor() - 6)
    error = ((rounded - x_NI).view(4, 3, 32) / unit).abs()
    whole = (rounded.view(4, 3, 32) / unit)[0]
    assert torch.equal(whole, whole.round())
    # The largest may lie beyond 127 by less than a whole number.
    assert float(error[0].max()) <= 1
    assert float((error[0] <= 0.5).float().mean()) > 0.95
    assert torch.equal(rounded.bfloat16().float().nan_to_num(), rounded.nan_to_num())
    assert rounded[1, :32].eq(0).all()
    assert rounded[3, :32].eq(0).all()
    assert rounded.isnan().view(4, 3, 32).float().mean(-1).tolist() == [
        [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]
    ]  # fmt: skip
    product = matrix_of("rounded", 3, 96)[1].product(x_NI)
    assert product.isnan().any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("kind", "code"),
    [("rounded", rounded_kernel.RoundedProduct), ("bytes", rounded_kernel.ByteProduct)],
)
def test_whole_numbers_are_multiplied_the_same_without_the_instruction(
    kind: str, code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, matrix = matrix_of(kind, 7, 160)
    x_NI = numbers(5, 160)
    theirs = matrix.product(x_NI)
    monkeypatch.setattr(rounded_kernel, "multiplies_bytes", lambda: False)

    @intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
    def product(_: Any, arguments: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            given = cgutils.unpack_tuple(builder, values[0])
            code(builder, given).emit()
            return context.get_dummy_value()

        return types.void(arguments), emit

    @njit  # type: ignore[untyped-decorator]  # numba is untyped
    def multiply(arguments: Any) -> None:
        product(arguments)

    described = matrix.described
    numbers_MP, beside = weighted(described, x_NI.numpy())
    y_NO = np.empty((5, 7), np.float32)
    multiply(
        (
            *described[[WEIGHTS, STRIDE, SCALES, GROUPS, GROUP, OUTPUTS, INPUTS]].tolist(),
            numbers_MP.ctypes.data, beside.ctypes.data, 5, y_NO.ctypes.data, 7,
        )
    )  # fmt: skip
    assert torch.equal(torch.from_numpy(y_NO) + numbers(7, seed=2), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [40, 5000])
def test_a_shortlist_says_the_likeliest_tokens_as_the_native_head_does(
    dtype: torch.dtype, tokens: int
) -> None:
    weight_VD, bias_V = numbers(tokens, 96, seed=1).to(dtype), numbers(tokens, seed=2).to(dtype)
    coarse = Int4Weight(weight_VD, 32, rounds=True).matrix(bias_V)
    x_ND = numbers(5, 96).to(dtype)
    truth = nn.functional.linear(x_ND.double(), weight_VD.double(), bias_V.double())
    listed = Shortlist(coarse, weight_VD, bias_V)
    logits = listed.product(x_ND)
    best = truth.topk(8).indices
    exact = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(
        logits.gather(1, best).double(), truth.gather(1, best), rtol=exact, atol=1e-5
    )
    assert torch.equal(logits.argmax(-1), best[:, 0])
    near = ((logits.double() - truth).abs() <= exact * truth.abs() + 1e-5).sum(1)
    assert int(near.min()) >= min(tokens, LISTED)
    assert torch.equal(torch.cat([listed.product(row_D[None]) for row_D in x_ND]), logits)
    x_ND[2] = float("nan")
    assert listed.product(x_ND).isnan().all(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [-3.0, -1.0, -2.0, -1.0],
        [-0.0, 0.0, -1.0, 0.0],
        [1.0, inf, 2.0, inf],
        [1.0, nan, inf, -nan],
        [-inf, -inf, -5.0, -inf],
        [-inf, -inf, -inf, -inf],
    ]
    assert likeliest(torch.tensor(rows, dtype=dtype)) == [1, 0, 1, 1, 2, 0]
    logits_NV = numbers(7, 1001).to(dtype)
    assert likeliest(logits_NV) == logits_NV.float().numpy().argmax(-1).tolist()
    assert likeliest(logits_NV[:, :500]) == logits_NV[:, :500].float().numpy().argmax(-1).tolist()
