"""What tests of compiled kernels share: matrices of every kind, steps of several forms.

Shape suffixes: N rows, I inputs, O outputs, B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.worker.model.attention import Window, decode_window, prefill_window, ragged_window
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.kernels.rounding import rounded_rows
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.products import can_pack
from offramp.worker.model.quantised import Int4Weight, Int8Weight

LEAN = ("llama", "llama-mha", "mistral", "qwen2", "qwen3", "smollm3")
KINDS = ("bfloat16", "float32", "int8", "int4", "rounded", "bytes")
ALL = 10**6

needs_packing = pytest.mark.skipif(
    not can_pack(torch.ones(2, 2)), reason="this torch has no packed kernels"
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix_of(kind: str, outputs: int, inputs: int) -> tuple[Tensor, KernelMatrix]:
    """What a matrix of a kind stands for, exactly, and the matrix."""
    weight_OI, bias_O = numbers(outputs, inputs, seed=1), numbers(outputs, seed=2)
    if kind in ("bfloat16", "float32"):
        kept_OI = weight_OI.to(getattr(torch, kind))
        return kept_OI.double(), KernelMatrix(kept_OI, bias_O)
    if kind in ("int8", "bytes"):
        eight = Int8Weight(weight_OI, rounds=kind == "bytes")
        return eight.restored().double(), eight.matrix(bias_O)
    four = Int4Weight(weight_OI, 32, rounds=kind == "rounded")
    return four.restored().double(), four.matrix(bias_O)


def taken(kind: str, x_NI: Tensor) -> Tensor:
    """What rows stand for where a matrix of a kind multiplies them."""
    return rounded_rows(x_NI) if kind in ("rounded", "bytes") else x_NI


def states(stack: Any, rows: int, tokens: int, dtype: torch.dtype) -> Tensor:
    return numbers(rows, tokens, stack.width).to(dtype)


def windows(stack: Any, dtype: torch.dtype) -> list[tuple[Tensor, Window]]:
    """A prompt's tokens, some rows at one place, and rows of several tokens each."""
    heads = stack.heads_per_key
    steps = []
    made: list[tuple[int, int, Callable[[Tensor], Window]]] = [
        (1, 6, lambda x: prefill_window(1, 0, 6, heads, x)),
        (1, 3, lambda x: prefill_window(2, 17, 3, heads, x)),
        (3, 1, lambda x: decode_window([0, 1, 3], [40, 6, 18], heads, x)),
        (1, 1, lambda x: decode_window([2], [21], heads, x)),
        (3, 1, lambda x: decode_window([0, 1, 3], [35, 35, 60], heads, x)),
        (3, 4, lambda x: ragged_window([0, 1, 3], [43, 9, 19], [3, 4, 1], heads, x)),
    ]
    for rows, tokens, make in made:
        x_BTD = states(stack, rows, tokens, dtype)
        steps.append((x_BTD, make(x_BTD)))
    return steps


def cache(stack: Any) -> SlotKV:
    kv = SlotKV(stack, 4)
    kv.keys_LSGCH.copy_(numbers(*kv.keys_LSGCH.shape, seed=3))
    kv.values_LSGCH.copy_(numbers(*kv.values_LSGCH.shape, seed=4))
    return kv


def run(stack: Any, x_BTD: Tensor, window: Window, compiled_rows: int) -> tuple[Tensor, SlotKV]:
    """All layers of a stack over a cache; padding is 0 in what is returned."""
    kv = cache(stack)
    kv.open(window)
    rotary = stack.rotary(x_BTD, window.positions_BT)
    blocks: list[Any] = stack.blocks
    for index, layer in enumerate(blocks):
        layer.compiled_rows = compiled_rows
        x_BTD = stack.run_layer(index, x_BTD, rotary, window, kv)
    counts = torch.from_numpy(window.cells_M3[:, 2]).view(*x_BTD.shape[:2], 1)
    return torch.where(counts > 0, x_BTD, 0), kv
