"""Layers prepared for decoding: weights packed for few rows, attention over slots.

Layers are cloned without their weights being copied; the caller's model stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.worker.model import attention
from offramp.worker.model.lean import LeanLayer, Rotation, has_lean_form
from offramp.worker.model.products import Product, can_pack, packed_product, rows_up_to
from offramp.worker.model.stack import cloned


class Preparable(Protocol):
    """A stack whose modules can be exchanged."""

    blocks: list[nn.Module]
    head: nn.Module


S = TypeVar("S", bound=Preparable)


class PackedWeight:
    """One matrix, or several of the same input one above the other, in oneDNN's blocked layout.

    For 2 to 16 rows in float32 a product with it is 2 to 4 times as fast as with a plain matrix
    (benchmarks/decode.py), at the price of a second copy of the weights. How few
    rows gain depends on the processor, so for fewer the plain matrices are used, if that was
    measured to be faster; they are never copied.

    Args:
        parts_OI: Weights of the product, each [out, in].
        measures: Whether kernels are chosen by measurement; else it is always the packed one.

    Attributes:
        plain_rows: Up to so many rows are multiplied with the plain matrices.
    """

    def __init__(self, *parts_OI: Tensor, measures: bool = False) -> None:
        self._plain: tuple[Tensor, ...] = tuple(part_OI.detach() for part_OI in parts_OI)
        whole_OI = self._plain[0] if len(parts_OI) == 1 else torch.cat(self._plain)
        self._multiply_packed = packed_product(whole_OI)
        self.plain_rows = 0
        # In bfloat16 the two kernels' sums differ by a rounding step, and neither is much faster.
        if measures and whole_OI.dtype is torch.float32:
            parts = [(len(part_OI), part_OI.stride()) for part_OI in self._plain]
            name = "plain" if len(parts) == 1 else f"plain in parts {parts}"
            plain = partial(self._multiply_plainly, bias_O=None)
            self.plain_rows = rows_up_to(name, whole_OI, plain, partial(self, bias_O=None))

    def __call__(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        """x Wᵀ + b."""
        if self.plain_rows and x.numel() <= self.plain_rows * x.shape[-1]:
            return self._multiply_plainly(x, bias_O)
        return self._multiply_packed(x, bias_O)

    def _multiply_plainly(self, x: Tensor, bias_O: Tensor | None) -> Tensor:
        if len(self._plain) == 1:
            return nn.functional.linear(x, self._plain[0], bias_O)
        out = torch.cat([nn.functional.linear(x, part_OI) for part_OI in self._plain], dim=-1)
        return out if bias_O is None else out.add_(bias_O)


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


def prepare(stack: S) -> S:
    """Let a stack run layers that compute the same over a slot cache, and faster for few rows."""
    rotation = Rotation()
    stack.blocks = [_prepared(block, rotation) for block in stack.blocks]
    stack.head = _faster(stack.head) or stack.head
    return stack


def _prepared(block: nn.Module, rotation: Rotation) -> nn.Module:
    lean = has_lean_form(block) and can_pack(next(block.parameters()))
    # The lean layer's own products are packed; its clone, which runs while hooked, needs none.
    twin = cloned(block, _kept if lean else _faster)
    _attend_to_slots(twin)
    return LeanLayer(twin, rotation, _fused) if lean else twin


def _fused(linears: Sequence[nn.Module]) -> Product:
    """One product of linear maps of the same input, their outputs one after the other."""
    parts: Any = linears
    biases = [each.bias.detach() for each in parts if each.bias is not None]
    if any(type(each) is not nn.Linear for each in parts) or len(biases) not in (0, len(parts)):
        return _one_by_one(linears)
    packed = PackedWeight(*(each.weight for each in parts), measures=True)
    return partial(packed, bias_O=torch.cat(biases) if biases else None)


def _one_by_one(linears: Sequence[nn.Module]) -> Product:
    if len(linears) == 1:
        return linears[0]
    return lambda x: torch.cat([each(x) for each in linears], dim=-1)


def _kept(_: nn.Module) -> None:
    """Put a clone in every part's place, which shares its parameters."""


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
