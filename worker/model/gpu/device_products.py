"""Products with quantised weights on a device other than the CPU.

Few rows of bfloat16 are multiplied with int4 weights by PyTorch's CUDA kernel (tinygemm). Elsewhere
the weights are restored for each product: that saves memory, and takes longer than native weights.

Shape suffixes: O outputs, I inputs, G groups of an output's weights, N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from offramp.worker.model.products import BiasedProduct

log = logging.getLogger(__name__)

KERNEL_ROWS = 128
"""With more rows the int4 kernel takes longer than restoring the weights does, by a table of
torchao's (prototype/hqq, an A6000); not measured here."""

INNER_TILES = (8, 4, 2)
"""Tiles of 16 inputs that the kernel may keep together; the more, the wider its loads."""

OUTPUT_TILE = 8
TILE = 16

CAPABILITY = (8, 0)
"""Compute capability from which on the kernel exists (Ampere)."""

CLOSE = 2.0**-5
"""Largest error of the kernel, relative to the largest output: sums of bfloat16 differ by less."""


class Int4Kernel:
    """A matrix as tinygemm reads it: numbers q, with w = (q - 8) s + z.

    Args:
        q_OI: Numbers from 0 to 15, uint8.
        scale_OG, zero_OG: Scales and zero points of the groups, bfloat16.
    """

    def __init__(self, q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> None:
        self._outputs, self._inputs = q_OI.shape
        self._group_size = self._inputs // scale_OG.shape[1]
        tiles = next(each for each in INNER_TILES if self._inputs % (TILE * each) == 0)
        # Of two neighbours, the first lies in the upper four bits.
        pairs = (q_OI[:, ::2] << 4) | q_OI[:, 1::2]
        self._packed = torch._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        self._scales_GO2 = torch.stack((scale_OG.T, zero_OG.T), dim=-1).contiguous()

    def __call__(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x Wᵀ + b in bfloat16."""
        y_NO = torch._weight_int4pack_mm(
            x.reshape(-1, self._inputs).contiguous(),
            self._packed,
            self._group_size,
            self._scales_GO2,
        )
        y = y_NO.view(*x.shape[:-1], self._outputs)
        return y if bias_O is None else y + bias_O


def restored_product(restored: Callable[[], Tensor]) -> BiasedProduct:
    """Multiply with what a function restores, [O, I], at each call."""
    return lambda x, bias_O: linear(x, restored(), bias_O)


def int4_product(
    numbers: Callable[[], tuple[Tensor, Tensor, Tensor]], restored: Callable[[], Tensor]
) -> BiasedProduct:
    """Multiply by the kernel where there is one, and it does what it should.

    Args:
        numbers: Gives what ``Int4Kernel`` takes.
        restored: Gives the matrix that they stand for, [O, I].
    """
    plain, weight_OI = restored_product(restored), restored()
    kernel = _checked_kernel(numbers, weight_OI) if fits_kernel(weight_OI) else None
    if kernel is None:
        return plain

    def product(x: Tensor, bias_O: Tensor | None) -> Tensor:
        is_few = x.numel() <= KERNEL_ROWS * x.shape[-1]
        return kernel(x, bias_O) if is_few else plain(x, bias_O)

    return product


def fits_kernel(weight_OI: Tensor) -> bool:
    """Whether the CUDA kernel takes a matrix of this type and size, where it lies."""
    outputs, inputs = weight_OI.shape
    if weight_OI.device.type != "cuda" or weight_OI.dtype is not torch.bfloat16:
        return False
    if outputs % OUTPUT_TILE or inputs % (TILE * INNER_TILES[-1]) or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(weight_OI.device) >= CAPABILITY


def _checked_kernel(
    numbers: Callable[[], tuple[Tensor, Tensor, Tensor]], weight_OI: Tensor
) -> Int4Kernel | None:
    """The kernel, once it has multiplied as the restored weights do; else None."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(3, weight_OI.shape[1], generator=generator).to(weight_OI)
    expected_NO = linear(x_NI, weight_OI).float()
    try:
        kernel = Int4Kernel(*numbers())
        error = (kernel(x_NI, None).float() - expected_NO).abs().max()
        if bool(error <= CLOSE * expected_NO.abs().max()):
            return kernel
        problem = f"errs by {float(error):.3g}"
    except RuntimeError as failure:
        problem = f"fails ({failure})"
    _say_once(problem[:200])
    return None


@lru_cache(maxsize=1)
def _say_once(problem: str) -> None:
    log.warning("the int4 kernel %s; weights are restored for each product instead", problem)
