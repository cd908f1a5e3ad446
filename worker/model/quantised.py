"""Weights of fewer bytes: int8 per output, or int4 in groups, multiplied by kernels for them.

A quantised model is another model: its fingerprint says which weights it has. Its layers' and
head's matrices are quantised; norms, biases and embeddings stay as they are.

Shape suffixes: O outputs, I inputs, G groups of an output's weights, N rows, B blocks of weights,
H half of a block, J = I / 2 bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.controller.errors import ConfigError
from offramp.worker.model.gpu.device_products import int4_product, restored_product
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.kernels.multiply import BLOCK, LINE
from offramp.worker.model.kernels.rounding import interleaved
from offramp.worker.model.kernels.shortlist import Shortlist
from offramp.worker.model.kernels.vectors import LANES
from offramp.worker.model.precision import GROUP_SIZES, HeadWeights, Precision
from offramp.worker.model.products import (
    SIZES,
    BiasedProduct,
    Product,
    can_pack,
    on_rounded_rows,
    packed_product,
    rows_up_to,
)
from offramp.worker.model.stack import LayerStack, cloned

REFITS = 3
"""How often int4 scales and zero points are fitted anew to the values that were chosen by them."""


S = TypeVar("S", bound=LayerStack)


def quantise(stack: S, precision: Precision) -> S:
    """Let a stack run with quantised matrices; the caller's model stays as it was.

    Raises:
        ConfigError: a matrix does not fit it.
    """
    if precision.is_native:
        return stack
    if precision.weights != "native":
        replaced = partial(_quantised, precision=precision, weights=precision.weights)
        stack.adopt([cloned(block, replaced) for block in stack.blocks])
    if precision.head_weights != "native":
        stack.head = _quantised_head(stack.head, precision)
    return stack


class QuantisedLinear(nn.Module):
    """A linear map whose weight is kept in int8 or int4.

    On a CPU few rows are multiplied with the weight as it is kept, many with its restored values,
    which are kept in oneDNN's blocked layout, too. Where the one overtakes the other is measured
    (``worker/model/products.py``). Of other devices see ``worker/model/gpu/device_products.py``.

    Args:
        plain: The module it stands in for; its bias and hooks stay its own.
        kept: The weight, quantised.
        is_shortlist: Whether the largest outputs of few rows are multiplied again, with the plain
            weight, and many rows with that alone.

    Attributes:
        matrix: The weight and the bias, as compiled kernels take them; None but on a CPU.
        kernel_rows: Up to so many rows are multiplied by these.
    """

    def __init__(
        self, plain: Any, kept: Int8Weight | Int4Weight, *, is_shortlist: bool = False
    ) -> None:
        super().__init__()
        self.bias = plain.bias
        self._forward_hooks = plain._forward_hooks
        self._forward_pre_hooks = plain._forward_pre_hooks
        self._transposed = type(plain) is Conv1D
        self.kept = kept
        self.matrix: KernelMatrix | None = None
        self.kernel_rows = 0
        is_here = plain.weight.device.type == "cpu"
        if is_here or is_shortlist:
            restored_OI = plain.weight.detach().contiguous() if is_shortlist else kept.restored()
            many = _product_of(restored_OI)
        else:
            many = kept.device_product()
        self._multiply = on_rounded_rows(many) if kept.rounds and not is_shortlist else many
        if is_here:
            bias_O = None if plain.bias is None else plain.bias.detach()
            self.matrix = kept.matrix(bias_O)
            self._few: Product = self.matrix.product
            if is_shortlist:
                self._few = Shortlist(self.matrix, restored_OI, bias_O).product
            name = f"shortlist of {kept.name}" if is_shortlist else kept.name
            self.kernel_rows = rows_up_to(
                f"{name} or packed, {restored_OI.dtype}, {list(restored_OI.shape)}",
                torch.ones(SIZES[-1], restored_OI.shape[1], dtype=restored_OI.dtype),
                self._few,
                lambda x_NI: self._multiply(x_NI, None),
            )

    @property
    def weight(self) -> Tensor:
        """The weight's values, restored, in the shape of the module that it stands in for."""
        weight_OI = self.kept.restored()
        return weight_OI.T if self._transposed else weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        if self.matrix is None or x.numel() > self.kernel_rows * x.shape[-1]:
            return self._multiply(x, self.bias)
        return self._few(x)


def _product_of(weight_OI: Tensor) -> BiasedProduct:
    if can_pack(weight_OI):
        return packed_product(weight_OI)
    return lambda x, bias_O: nn.functional.linear(x, weight_OI, bias_O)


class Int8Weight:
    """Whole numbers from -127 to 127, and one scale per output.

    Args:
        weight_OI: The matrix, [out, in].
        rounds: Whether rows are rounded to 8 bits before they are multiplied; ``BLOCK`` divides
            the inputs then.
    """

    def __init__(self, weight_OI: Tensor, *, rounds: bool = False) -> None:
        self.name = "int8" + ", rows of int8" * rounds
        self.rounds = rounds
        weight_OI = weight_OI.detach()
        scale_O1 = weight_OI.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self._scale_O = scale_O1[:, 0].to(weight_OI.dtype)
        # By the scale as it is kept, so that rounding it costs nothing.
        values_OI = weight_OI.float() / self._scale_O.float()[:, None]
        self._values_OI = values_OI.round().clamp(-127, 127).to(torch.int8).contiguous()

    def matrix(self, bias_O: Tensor | None = None) -> KernelMatrix:
        """The numbers and scales, with a bias, as compiled kernels take them."""
        scale_O = self._scale_O.float()
        if not self.rounds:
            return KernelMatrix(self._values_OI, bias_O, scale_O)
        unsigned_OI = (self._values_OI.view(torch.uint8) ^ 128).view(torch.int8)
        kept, scales = interleaved(unsigned_OI, 4), interleaved(scale_O[:, None], 1)
        return KernelMatrix(kept, bias_O, scales, outputs=len(scale_O))

    def restored(self) -> Tensor:
        """The matrix that the numbers stand for, [O, I]."""
        return self._values_OI.to(self._scale_O.dtype) * self._scale_O[:, None]

    def device_product(self) -> BiasedProduct:
        """Multiply where the weight lies, other than on a CPU."""
        return restored_product(self.restored)


class Int4Weight:
    """Numbers from 0 to 15; per group a scale s and a zero point z: w = (q - 8) s + z.

    Scales and zero points start at the group's range and are fitted to the chosen numbers by least
    squares, and the numbers chosen anew, some times over. They are whole numbers of 8 bits times a
    power of two that all of an output's share: 4.5 bits a weight in groups of 32.

    Args:
        weight_OI: The matrix, [out, in].
        group_size: Neighbouring inputs of an output that share a scale.
        rounds: Whether rows are rounded to 8 bits before they are multiplied.

    Raises:
        ConfigError: the group size does not divide the inputs.
    """

    def __init__(self, weight_OI: Tensor, group_size: int, *, rounds: bool = False) -> None:
        outputs, inputs = weight_OI.shape
        if inputs % group_size:
            raise ConfigError(
                "group_size",
                f"{group_size} does not divide a matrix's {inputs} inputs",
                f"Use {' or '.join(str(n) for n in GROUP_SIZES if not inputs % n) or 'int8'}",
            )
        self.name = f"int4 in groups of {group_size}" + ", rows of int8" * rounds
        self.rounds = rounds
        self._group_size = group_size
        self._dtype = weight_OI.dtype
        groups_OGS = weight_OI.detach().float().view(outputs, -1, group_size)
        q_OGS, (scale_OG, unit_O1), (zero_OG, zero_unit_O1) = _fit_groups(groups_OGS)
        # Whole numbers of 8 bits times a power of two: bfloat16 holds them exactly.
        self._scale_OG = (scale_OG * unit_O1).bfloat16()
        self._zero_OG = (zero_OG * zero_unit_O1).bfloat16()
        self._units = torch.cat((unit_O1, zero_unit_O1 / unit_O1), dim=1)
        counts = (scale_OG.to(torch.uint8), zero_OG.to(torch.int8).view(torch.uint8))
        self._groups = torch.stack(counts, 1)
        # A block's first half lies in the lower four bits.
        q_OB2H = q_OGS.view(outputs, -1, 2, BLOCK // 2)
        pairs_OBH = q_OB2H[:, :, 0] | (q_OB2H[:, :, 1] << 4)
        self._kept = pairs_OBH.to(torch.uint8).view(outputs, -1)
        if rounds:
            self._units = interleaved(self._units, 1)
            self._groups = interleaved(self._groups.transpose(1, 2), 1)
            self._kept = interleaved(self._kept, 4)
        else:
            self._groups, self._kept = _with_room(self._groups, LANES), _with_room(self._kept, LINE)

    def matrix(self, bias_O: Tensor | None = None) -> KernelMatrix:
        """The numbers, scales and zero points, with a bias, as compiled kernels take them."""
        return KernelMatrix(
            self._kept, bias_O, self._units, self._groups, self._group_size,
            outputs=len(self._scale_OG) if self.rounds else None,
        )  # fmt: skip

    def restored(self) -> Tensor:
        """The matrix that the numbers stand for, [O, I]."""
        q_OGS = self._numbers_OI().view(*self._scale_OG.shape, -1).to(torch.int8) - 8
        weight_OGS = q_OGS.float() * self._scale_OG.float()[:, :, None]
        weight_OGS += self._zero_OG.float()[:, :, None]
        return weight_OGS.flatten(1).to(self._dtype)

    def device_product(self) -> BiasedProduct:
        """Multiply where the weight lies, other than on a CPU."""
        numbers = (self._scale_OG, self._zero_OG)
        return int4_product(lambda: (self._numbers_OI(), *numbers), self.restored)

    def _numbers_OI(self) -> Tensor:
        """The numbers from 0 to 15, one by one, uint8."""
        outputs = len(self._scale_OG)
        kept_OJ = self._kept
        if self.rounds:
            by_lane = kept_OJ.view(len(kept_OJ) // LANES, -1, LANES, 4)
            kept_OJ = by_lane.transpose(1, 2).reshape(len(kept_OJ), -1)[:outputs]
        kept_OBH = kept_OJ.view(outputs, -1, BLOCK // 2)
        return torch.stack((kept_OBH & 15, kept_OBH >> 4), dim=2).flatten(1)


def _with_room(part: Tensor, count: int) -> Tensor:
    """The same behind which so many numbers can be read: kernels read a vector to its end."""
    return nn.functional.pad(part.flatten(), (0, count))[: part.numel()].view(part.shape)


def _fit_groups(w_OGS: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Numbers [O, G, S] (int32); scales and zero points, each in whole numbers [O, G] of a unit."""
    low, high = w_OGS.amin(-1), w_OGS.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = low + 8 * scale
    for refit in range(REFITS + 1):
        scale_OG, unit_O1 = _in_units(scale, 255)
        zero_OG, zero_unit_O1 = _in_units(zero, 127)
        scale, zero = scale_OG.clamp_(min=1) * unit_O1, zero_OG * zero_unit_O1
        q = ((w_OGS - zero[:, :, None]) / scale[:, :, None]).round_().add_(8).clamp_(0, 15)
        if refit == REFITS:
            break
        centred = q - q.mean(-1, keepdim=True)
        spread = centred.square().sum(-1)
        slope = (centred * w_OGS).sum(-1) / spread.clamp(min=1e-8)
        scale = torch.where((spread > 0) & (slope > 1e-8), slope, scale)
        zero = w_OGS.mean(-1) - scale * (q.mean(-1) - 8)
    return q.to(torch.int32), (scale_OG, unit_O1), (zero_OG, zero_unit_O1)


def _in_units(value_OG: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Numbers as whole ones, of at most so much, and the least power of two for it [O, 1]."""
    largest_O1 = value_OG.abs().amax(1, keepdim=True).clamp(min=1e-20)
    unit_O1 = torch.exp2(torch.log2(largest_O1 / most).ceil())
    return (value_OG / unit_O1).round_().clamp_(-most, most), unit_O1


def _quantised(
    module: nn.Module, precision: Precision, weights: HeadWeights
) -> QuantisedLinear | None:
    # Subclasses may compute something else.
    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight: Any = module.weight
    weight_OI = weight.T.contiguous() if type(module) is Conv1D else weight
    if weights == "int8":
        return QuantisedLinear(module, Int8Weight(weight_OI))
    rounds = precision.activations == "int8"
    kept = Int4Weight(weight_OI, precision.group_size, rounds=rounds)
    return QuantisedLinear(module, kept, is_shortlist=weights == "shortlist")


def _quantised_head(head: nn.Module, precision: Precision) -> nn.Module:
    try:
        quantised = _quantised(head, precision, precision.head_weights)
    except ConfigError as error:
        field = "head_weights" if error.field == "weights" else error.field
        raise ConfigError(field, f"{error.problem} (the head)", error.remedy) from error
    if quantised is None:
        kind = type(head).__name__
        raise ConfigError("head_weights", f"cannot quantise a {kind}", "Use head_weights=native")
    return quantised
