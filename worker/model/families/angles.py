"""Cosines and sines of every position, computed once by the model's own module.

Shape suffixes: B rows, T tokens, C positions, H rotated part of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.worker.model.stack import Rotary

TABLE_BYTES = 64 * 1024 * 1024
"""A larger table is not kept; then each step asks the model's module."""


class Angles:
    """Rotary embeddings whose angles depend on the position alone.

    In a decode step two lookups take a tenth of the time of the module's dozen operations.

    Args:
        module: Hugging Face's rotary embedding; None for a family without.
        context: Most tokens of a sequence C.
        dtype, device: Dtype and device of the model.
    """

    def __init__(self, module: Any, context: int, dtype: torch.dtype, device: torch.device) -> None:
        self._module = module
        self._tables: list[Tensor] = []
        if module is None:
            return
        like = torch.empty(1, dtype=dtype, device=device)
        sample = module(like, torch.zeros((1, 1), dtype=torch.long, device=device))
        if 2 * context * sample[0].nbytes <= TABLE_BYTES:
            positions_1C = torch.arange(context, device=device)[None]
            self._tables = [part[0].contiguous() for part in module(like, positions_1C)]

    def at(self, x_BTD: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines [B, T, H]; empty for a family without rotary embeddings."""
        if self._tables:
            return tuple(torch.nn.functional.embedding(positions_BT, t) for t in self._tables)
        return () if self._module is None else tuple(self._module(x_BTD, positions_BT))
