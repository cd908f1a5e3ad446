"""Preallocated key/value cache with a slot and a write position per row.

Shape suffixes: L layers, S slots, B rows of a step, G key/value heads, C capacity in tokens,
H head_dim, T tokens, N rows filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.worker.model.attention import Window
from offramp.worker.model.stack import LayerStack

BLOCK_TOKENS = 128
"""Capacity grows by this many tokens at a time."""

EXACT, PROJECTED, PENDING = 0, 1, 2
"""Provenance of a position: every layer executed; some projected; some still to be executed."""


class Entries(NamedTuple):
    """What some layers hold of neighbouring tokens of one row.

    Attributes:
        keys_LGTH: Their keys.
        values_LGTH: Their values.
    """

    keys_LGTH: Tensor
    values_LGTH: Tensor

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.keys_LGTH.nbytes + self.values_LGTH.nbytes


class SlotKV:
    """Keys and values of every layer, slot and position; behind the model's, those of adapters.

    Invariant: when a layer runs a token, that layer has an entry at every earlier position of the
    row, executed or projected, so one window serves all layers of a step.

    Args:
        stack: The model whose cache this is.
        slots: Rows that can be held at once.

    Attributes:
        spare: A slot after the others that nobody reads; on a device other than the CPU captured
            layers write there what belongs to no row.
        held: Slots in all, the spare one included.
    """

    def __init__(self, stack: LayerStack, slots: int) -> None:
        self.slots = self.spare = slots
        self.capacity = BLOCK_TOKENS
        self.held = slots + (stack.device.type != "cpu")
        shape = (len(stack.blocks), self.held, stack.kv_heads, BLOCK_TOKENS, stack.head_dim)
        self.keys_LSGCH = torch.zeros(shape, dtype=stack.dtype, device=stack.device)
        self.values_LSGCH = torch.zeros_like(self.keys_LSGCH)
        self.provenance_SC = np.zeros((slots, BLOCK_TOKENS), np.uint8)
        self._used = [0] * slots
        self._window = Window((), (), torch.empty((0, 0)), np.empty((0, 3), np.int64))

    @property
    def bytes_per_token(self) -> int:
        """Memory of one position in all slots, the spare one included."""
        return self.bytes_per_token_of(len(self.keys_LSGCH))

    def bytes_per_token_of(self, layers: int) -> int:
        """What that would be with entries of so many layers."""
        return 2 * self.keys_LSGCH[0].nbytes * layers // self.capacity

    def reserve(self, tokens: int) -> None:
        """Grow in whole blocks until every slot can hold this many tokens."""
        if tokens <= self.capacity:
            return
        capacity = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        layers = len(self.keys_LSGCH)
        self.keys_LSGCH = _grown(self.keys_LSGCH, layers, capacity)
        self.values_LSGCH = _grown(self.values_LSGCH, layers, capacity)
        self.provenance_SC = np.pad(self.provenance_SC, ((0, 0), (0, capacity - self.capacity)))
        self.capacity = capacity

    def make_room(self, layers: int) -> None:
        """Hold entries of so many layers, those of adapters included."""
        if layers > len(self.keys_LSGCH):
            self.keys_LSGCH = _grown(self.keys_LSGCH, layers, self.capacity)
            self.values_LSGCH = _grown(self.values_LSGCH, layers, self.capacity)

    def open(self, window: Window) -> None:
        """Say where the next layers write."""
        self._window = window

    def update(
        self, keys_BGTH: Tensor, values_BGTH: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the window's new entries; return the layer's whole keys and values [S, G, C, H]."""
        keys_SGCH = self.keys_LSGCH[layer]
        values_SGCH = self.values_LSGCH[layer]
        write = self._window.write
        keys_SGCH[write] = self._entries(keys_BGTH)
        values_SGCH[write] = self._entries(values_BGTH)
        return keys_SGCH, values_SGCH

    def addresses(self) -> tuple[int, int, int]:
        """Where the first layer's keys and values begin, for compiled code; bytes of a layer."""
        keys = self.keys_LSGCH
        layer_bytes = keys.stride(0) * keys.element_size()
        return keys.data_ptr(), self.values_LSGCH.data_ptr(), layer_bytes

    def fill(
        self,
        first_layer: int,
        slots_N: Tensor,
        positions_N: Tensor,
        keys_NLGH: Tensor,
        values_NLGH: Tensor,
    ) -> None:
        """Write projected entries of the layers from ``first_layer`` (index) on, one per token."""
        layers = slice(first_layer, first_layer + keys_NLGH.shape[1])
        where = (layers, slots_N, slice(None), positions_N)
        self.keys_LSGCH[where] = keys_NLGH
        self.values_LSGCH[where] = values_NLGH

    def values_before(self, layer: int, slots_N: Tensor, positions_N: Tensor) -> Tensor:
        """Values [N, G·H] that a layer (index) keeps of the tokens before these; of none, zeros."""
        before_N = (positions_N - 1).clamp(min=0)
        values_NGH = self.values_LSGCH[layer, slots_N, :, before_N]
        return torch.where(positions_N[:, None] > 0, values_NGH.flatten(1), 0.0)

    def mark(self, slot: int, positions: slice, provenance: int) -> None:
        """Note where a row's entries come from."""
        self.provenance_SC[slot, positions] = provenance
        self._used[slot] = max(self._used[slot], positions.stop)

    def entries(self, slot: int, positions: slice, layers: Sequence[int]) -> Entries:
        """Copy what some layers hold of a row's positions."""
        # Layer by layer: an index over layers takes fifteen times as long.
        return Entries(
            torch.stack([self.keys_LSGCH[layer, slot, :, positions] for layer in layers]),
            torch.stack([self.values_LSGCH[layer, slot, :, positions] for layer in layers]),
        )

    def restore(self, slot: int, positions: slice, layers: Sequence[int], copied: Entries) -> None:
        """Write such a copy, of positions whose every layer was executed."""
        for layer, keys_GTH, values_GTH in zip(layers, *copied, strict=True):
            self.keys_LSGCH[layer, slot, :, positions] = keys_GTH
            self.values_LSGCH[layer, slot, :, positions] = values_GTH
        self.mark(slot, positions, EXACT)

    def exact_share(self, slot: int, tokens: int) -> float:
        """Share of a row's first positions whose every layer was executed."""
        return float((self.provenance_SC[slot, :tokens] == EXACT).mean()) if tokens else 1.0

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one row's entries to another slot (done once per finished request)."""
        self.keys_LSGCH[:, target, :, :tokens] = self.keys_LSGCH[:, source, :, :tokens]
        self.values_LSGCH[:, target, :, :tokens] = self.values_LSGCH[:, source, :, :tokens]
        self.provenance_SC[target] = self.provenance_SC[source]
        self._used[target] = max(self._used[target], tokens)

    def clear(self, slot: int) -> None:
        """Wipe a slot that its row has left: a masked entry still spoils a sum if it is NaN."""
        used = self._used[slot]
        self.keys_LSGCH[:, slot, :, :used] = 0
        self.values_LSGCH[:, slot, :, :used] = 0
        self._used[slot] = 0

    def _entries(self, new_BGTH: Tensor) -> Tensor:
        """New entries in the order of the write index."""
        chosen = self._window.chosen
        if chosen is not None:
            return new_BGTH.transpose(1, 2)[chosen]
        if isinstance(self._window.write[0], int):
            return new_BGTH[0]
        return new_BGTH.transpose(1, 2).flatten(0, 1)


def _grown(old: Tensor, layers: int, capacity: int) -> Tensor:
    before, slots, heads, used, width = old.shape
    new = old.new_zeros((layers, slots, heads, capacity, width))
    new[:before, :, :, :used] = old
    return new
