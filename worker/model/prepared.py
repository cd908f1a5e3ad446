"""Layers prepared for decoding: weights packed for few rows, attention over slots.

Layers are cloned without their weights being copied; the caller's model stays as it was.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.worker.model import attention
from offramp.worker.model.products import rows_up_to
from offramp.worker.model.stack import cloned


class Preparable(Protocol):
    """A stack whose modules can be exchanged."""

    blocks: list[nn.Module]
    head: nn.Module


S = TypeVar("S", bound=Preparable)


class PackedWeight:
    """A matrix in oneDNN's blocked layout.

    For 2 to 16 rows in float32 a product with it is 2 to 4 times as fast as with a plain matrix
    (benchmarks/decode.py), at the price of a second copy of the weight. How few
    rows gain depends on the processor, so for fewer the plain matrix is used, if that was measured
    to be faster.

    Args:
        weight_OI: Weight of the product, [out, in].
        measures: Whether kernels are chosen by measurement; else it is always the packed one.

    Attributes:
        plain_rows: Up to so many rows are multiplied with the plain matrix.
    """

    def __init__(self, weight_OI: Tensor, *, measures: bool = False) -> None:
        weight_OI = weight_OI.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
        self._plain = weight_OI
        self.plain_rows = 0
        # In bfloat16 the two kernels' sums differ by a rounding step, and neither is much faster.
        if measures and weight_OI.dtype is torch.float32:
            plain = partial(nn.functional.linear, weight=weight_OI)
            self.plain_rows = rows_up_to("plain", weight_OI, plain, lambda x: self(x, None))

    def __call__(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x Wᵀ + b."""
        if self.plain_rows and x.numel() <= self.plain_rows * x.shape[-1]:
            return nn.functional.linear(x, self._plain, bias_O)
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            x, self._packed, bias_O, "none", [], ""
        )


class PackedLinear(nn.Module):
    """A linear map whose weight is packed.

    Args:
        plain: The module it stands in for; its parameters stay in reach under their names.
        weight_OI: The plain module's weight as [out, in].
    """

    def __init__(self, plain: Any, weight_OI: Tensor) -> None:
        super().__init__()
        self.weight = plain.weight
        self.bias = plain.bias
        # What was hooked to the plain module must go on being called.
        self._forward_hooks = plain._forward_hooks
        self._forward_pre_hooks = plain._forward_pre_hooks
        self.packed = PackedWeight(weight_OI, measures=True)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return self.packed(x, self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether this torch, on this processor, has the packed kernels for the weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def prepare(stack: S) -> S:
    """Let a stack run layers that compute the same over a slot cache, and faster for few rows."""
    stack.blocks = [cloned(block, _faster) for block in stack.blocks]
    for block in stack.blocks:
        _attend_to_slots(block)
    stack.head = _faster(stack.head) or stack.head
    return stack


def _attend_to_slots(block: nn.Module) -> None:
    for module in block.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            # nn.Module's attributes are untyped.
            twin: Any = module
            twin.config = copy.copy(config)
            twin.config._attn_implementation_internal = attention.NAME


def _faster(module: nn.Module) -> nn.Module | None:
    # Subclasses may compute something else.
    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight: Any = module.weight
    if not can_pack(weight):
        return None
    return PackedLinear(module, weight.T if type(module) is Conv1D else weight)
