"""Preallocated key/value cache with a slot and a write position per row.

Shape suffixes: L layers, S slots, B rows of a step, G key/value heads, C capacity in tokens,
H head_dim, T tokens, N rows filled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.worker.stack import LayerStack

BLOCK_TOKENS = 128
"""Capacity grows by this many tokens at a time."""

Rows = slice | Tensor


class SlotKV:
    """Keys and values of every layer, slot and position.

    Invariant: every layer has an entry at every position below a row's length, executed or
    projected, so one mask serves all layers and no layer ever disagrees on a length.

    Args:
        stack: The model whose cache this is.
        slots: Rows that can be held at once.
    """

    def __init__(self, stack: LayerStack, slots: int) -> None:
        self.slots = slots
        self.capacity = BLOCK_TOKENS
        shape = (stack.layers, slots, stack.kv_heads, BLOCK_TOKENS, stack.head_dim)
        self.keys_LSGCH = torch.zeros(shape, dtype=stack.dtype, device=stack.device)
        self.values_LSGCH = torch.zeros_like(self.keys_LSGCH)
        self._rows: Rows = slice(0, 1)
        self._write: tuple[Any, ...] = ()
        self._span = 0

    def reserve(self, tokens: int) -> None:
        """Grow in whole blocks until every slot can hold this many tokens."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        self.keys_LSGCH = _grown(self.keys_LSGCH, capacity)
        self.values_LSGCH = _grown(self.values_LSGCH, capacity)
        self.capacity = capacity

    def open_window(self, slots: Sequence[int], positions: Sequence[int], tokens: int = 1) -> None:
        """Say which rows the next layers write and read: ``tokens`` entries from each position.

        Rows whose slots are evenly spaced are read as a view; only others are gathered.
        """
        self._rows = _as_rows(slots, self.keys_LSGCH.device)
        self._span = max(positions) + tokens
        first = positions[0]
        if isinstance(self._rows, slice) and all(position == first for position in positions):
            self._write = (self._rows, slice(None), slice(first, first + tokens))
        else:
            # Rows of different lengths only ever advance together by one token.
            assert tokens == 1
            device = self.keys_LSGCH.device
            self._write = (
                torch.tensor(slots, device=device),
                slice(None),
                torch.tensor(positions, device=device),
            )

    def update(
        self, keys_BGTH: Tensor, values_BGTH: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the window's new entries; return keys and values [B, G, span, H] to attend to."""
        keys_SGCH = self.keys_LSGCH[layer]
        values_SGCH = self.values_LSGCH[layer]
        if isinstance(self._write[2], slice):
            keys_SGCH[self._write] = keys_BGTH
            values_SGCH[self._write] = values_BGTH
        else:
            keys_SGCH[self._write] = keys_BGTH[:, :, 0]
            values_SGCH[self._write] = values_BGTH[:, :, 0]
        return keys_SGCH[self._rows, :, : self._span], values_SGCH[self._rows, :, : self._span]

    def fill(
        self,
        first_layer: int,
        slots: Sequence[int],
        positions: Sequence[int],
        keys_NLGH: Tensor,
        values_NLGH: Tensor,
    ) -> None:
        """Write projected entries of the layers from ``first_layer`` (index) on, one per row."""
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            self.keys_LSGCH[first_layer:, slot, :, position] = keys_NLGH[row]
            self.values_LSGCH[first_layer:, slot, :, position] = values_NLGH[row]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one row's entries to another slot (done once per finished request)."""
        self.keys_LSGCH[:, target, :, :tokens] = self.keys_LSGCH[:, source, :, :tokens]
        self.values_LSGCH[:, target, :, :tokens] = self.values_LSGCH[:, source, :, :tokens]


def _grown(old: Tensor, capacity: int) -> Tensor:
    layers, slots, heads, used, width = old.shape
    new = old.new_zeros((layers, slots, heads, capacity, width))
    new[:, :, :, :used] = old
    return new


def _as_rows(slots: Sequence[int], device: torch.device) -> Rows:
    step = slots[1] - slots[0] if len(slots) > 1 else 1
    even = step > 0 and all(b - a == step for a, b in itertools.pairwise(slots))
    if even:
        return slice(slots[0], slots[-1] + 1, step)
    return torch.tensor(slots, device=device)
