"""Layers prepared for decoding: weights packed for few rows, attention over slots.

Layers are cloned without their weights being copied; the caller's model stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from offramp.worker.model import attention
from offramp.worker.model.attention import Window, decode_window
from offramp.worker.model.gpu.graphs import GraphedLayers, cuda_recorder
from offramp.worker.model.kernels.compiled_layer import CompiledLayers, LayerForm
from offramp.worker.model.kernels.matrix import KernelMatrix, is_readable
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.lean import LeanLayer, LeanRun, Rotation, has_lean_form, lean_norm
from offramp.worker.model.products import SIZES, Product, can_pack, packed_product, rows_up_to
from offramp.worker.model.quantised import QuantisedLinear
from offramp.worker.model.stack import LayerStack, Rotary, cloned

MEASURED_AT = 100
"""Position at which layers are compared: attention has something to read there."""


S = TypeVar("S", bound=LayerStack)


class PackedWeight:
    """One matrix, or several of the same input one above the other, in oneDNN's blocked layout.

    For many rows a product with it is up to 4 times as fast as with a plain matrix in float32
    (benchmarks/few_rows.py), at the price of a second copy of the weights. Few rows are multiplied
    by compiled code with the plain matrices, which are never copied, up to where that is measured
    to be faster.

    Args:
        parts_OI: Weights of the product, each [out, in].
        bias_O: Added to it; None: nothing.

    Attributes:
        kernel_rows: Up to so many rows are multiplied with the plain matrices, by kernels.
        matrix: The plain matrix, if it is one, as kernels take it.
    """

    def __init__(self, *parts_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self._plain: tuple[Tensor, ...] = tuple(part_OI.detach() for part_OI in parts_OI)
        self._bias_O = bias_O
        whole_OI = self._plain[0] if len(parts_OI) == 1 else torch.cat(self._plain)
        self._multiply_packed = packed_product(whole_OI)
        self.kernel_rows = 0
        self.matrix: KernelMatrix | None = None
        if all(is_readable(part_OI) for part_OI in self._plain):
            heights = [len(part_OI) for part_OI in self._plain]
            biases = [None] * len(heights) if bias_O is None else torch.split(bias_O, heights)
            self._parts = [
                KernelMatrix(part_OI, part_O)
                for part_OI, part_O in zip(self._plain, biases, strict=True)
            ]
            self.matrix = self._parts[0] if len(self._parts) == 1 else None
            self.kernel_rows = rows_up_to(
                f"plain (threads) or packed, {whole_OI.dtype}, {heights} of {whole_OI.shape[1]}",
                whole_OI.new_ones(SIZES[-1], whole_OI.shape[1]),
                self._multiply_plainly,
                lambda x_NI: self._multiply_packed(x_NI, bias_O),
            )

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        if x.numel() <= self.kernel_rows * x.shape[-1]:
            return self._multiply_plainly(x)
        return self._multiply_packed(x, self._bias_O)

    def _multiply_plainly(self, x: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0].product(x)
        return torch.cat([part.product(x) for part in self._parts], dim=-1)


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
        bias_O = None if plain.bias is None else plain.bias.detach()
        self.packed = PackedWeight(weight_OI, bias_O=bias_O)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""
        return self.packed(x)


def prepare(stack: S, *, cuda_graphs: bool = True) -> S:
    """Let a stack run layers that compute the same over a slot cache, and faster for few rows.

    Args:
        stack: Its layers and head are exchanged.
        cuda_graphs: Whether layers on a GPU are captured, and replayed by one launch.
    """
    rotation = Rotation()
    stack.blocks = [_prepared(block, rotation) for block in stack.blocks]
    stack.head = _faster(stack.head) or stack.head
    if stack.device.type == "cpu":
        stack.final_norm = lean_norm(stack.final_norm, stack.dtype) or stack.final_norm
    _choose_compiled(stack)
    if cuda_graphs and stack.device.type == "cuda":
        stack.run_compiled = GraphedLayers(stack, partial(cuda_recorder, stack.device))
    return stack


def joining(stack: LayerStack, added: Mapping[int, nn.Module]) -> Callable[[], None]:
    """Prepare layers that join a prepared stack while it runs.

    Args:
        stack: Stays as it is.
        added: New layers by index; behind the others, or in place of some that nobody runs.

    Returns:
        What puts them there; to be called when no layer of the stack runs.
    """
    blocks = list(stack.blocks)
    rotation = Rotation()
    for index, block in sorted(added.items()):
        blocks[index : index + 1] = [_prepared(block, rotation)]
    layers = [block for block in blocks if isinstance(block, LeanLayer)]
    forms = [layer.form for layer in layers if layer.form is not None]
    was = stack.run_compiled
    compiled = CompiledLayers(forms) if len(forms) == len(blocks) else None
    # By shape, as it was measured. Another is not measured while others decode: it is not compiled.
    rows = {each.form.name: each.compiled_rows for each in layers if each.compiled and each.form}

    def put() -> None:
        stack.blocks = blocks
        if isinstance(was, LeanRun) and compiled is not None:
            for layer, form in zip(layers, forms, strict=True):
                layer.compiled, layer.compiled_rows = compiled, rows.get(form.name, 0)
            stack.run_compiled = LeanRun(layers, compiled)
        elif isinstance(was, GraphedLayers):
            stack.run_compiled = GraphedLayers(stack, partial(cuda_recorder, stack.device))

    return put


def _prepared(block: nn.Module, rotation: Rotation) -> nn.Module:
    lean = has_lean_form(block) and can_pack(next(block.parameters()))
    # The lean layer's own products are packed; its clone, which runs while hooked, needs none.
    twin = cloned(block, _kept if lean else _faster)
    _attend_to_slots(twin)
    return LeanLayer(twin, rotation, _fused, _form_of(twin)) if lean else twin


def _form_of(layer: Any) -> LayerForm | None:
    """What compiled code must know of a layer; None if a matrix is not readable as it lies."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    parts = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    matrices = [_matrix_of(part) for part in parts]
    readable = [matrix for matrix in matrices if matrix is not None]
    return LayerForm(layer, readable) if len(readable) == len(matrices) else None


def _matrix_of(linear: Any) -> KernelMatrix | None:
    if isinstance(linear, QuantisedLinear):
        return linear.matrix
    bias_O = None if linear.bias is None else linear.bias.detach()
    return KernelMatrix(linear.weight.detach(), bias_O) if is_readable(linear.weight) else None


def _choose_compiled(stack: Any) -> None:
    """Measure up to how many tokens compiled layers are faster, and let them run those."""
    layers = [block for block in stack.blocks if isinstance(block, LeanLayer)]
    forms = [layer.form for layer in layers if layer.form is not None]
    if len(forms) < len(stack.blocks):
        return
    compiled = CompiledLayers(forms)
    rows: dict[str, int] = {}
    for layer, form in zip(layers, forms, strict=True):
        layer.compiled = compiled
        if form.name not in rows:
            rows[form.name] = _rows_compiled(stack, form.name, layer)
        layer.compiled_rows = rows[form.name]
    stack.run_compiled = LeanRun(layers, compiled)


def _rows_compiled(stack: Any, form: str, layer: LeanLayer) -> int:
    kv = SlotKV(stack, SIZES[-1])

    @lru_cache
    def step(rows: int) -> tuple[Window, Rotary]:
        positions = [min(MEASURED_AT, stack.context - 1)] * rows
        window = decode_window(range(rows), positions, stack.heads_per_key, rows_MD)
        return window, stack.rotary(rows_MD[:rows, None], window.positions_BT)

    def run(x_ND: Tensor, compiled_rows: int) -> Tensor:
        layer.compiled_rows = compiled_rows
        window, rotary = step(len(x_ND))
        kv.open(window)
        return stack.run_layer(layer.index, x_ND[:, None], rotary, window, kv)  # type: ignore[no-any-return]

    rows_MD = torch.ones(SIZES[-1], stack.width, dtype=stack.dtype)
    compiled, lean = (partial(run, compiled_rows=rows) for rows in (SIZES[-1], 0))
    return rows_up_to(f"compiled (threads) or lean layer, {form}", rows_MD, compiled, lean)


def _fused(linears: Sequence[nn.Module]) -> Product:
    """One product of linear maps of the same input, their outputs one after the other."""
    parts: Any = linears
    biases = [each.bias.detach() for each in parts if each.bias is not None]
    if any(type(each) is not nn.Linear for each in parts) or len(biases) not in (0, len(parts)):
        return _one_by_one(linears)
    weights = (each.weight for each in parts)
    return PackedWeight(*weights, bias_O=torch.cat(biases) if biases else None)


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
