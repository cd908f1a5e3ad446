"""What drafts on a copy of the layers see: the copy's states after full depth's entries.

Shape suffixes: T tokens, N of them side by side, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offramp.worker.model.attention import decode_window, prefill_window
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.transfers import upload

SIDE_BY_SIDE = 8
"""Tokens that run at once, each in a slot of its own."""


class CopyPass:
    """Runs a document's tokens on a copy, each as if all before it had been verified.

    Args:
        stack: The model, as a stack of layers.
        copy: Its layers in fewer bytes.
        first: Tokens of a document before it are not run.
    """

    def __init__(self, stack: LayerStack, copy: LayerStack, first: int = 0) -> None:
        self.stack, self.copy, self.first = stack, copy, first
        self._kv = SlotKV(stack, SIDE_BY_SIDE)

    @torch.inference_mode()
    def states(self, tokens: Sequence[int], exits: Sequence[int]) -> dict[int, Tensor]:
        """Hidden states [T, D] after each exit on the copy; zeros where none is run."""
        self._read(tokens)
        states = {
            layer: torch.zeros(
                len(tokens), self.stack.width, dtype=self.stack.dtype, device=self.stack.device
            )
            for layer in exits
        }
        # From the last on: what a token writes in its slot, none of those before it reads.
        for end in range(len(tokens), self.first, -SIDE_BY_SIDE):
            positions = range(max(self.first, end - SIDE_BY_SIDE), end)
            for layer, state_ND in self._run(tokens, positions, exits):
                states[layer][positions.start : end] = state_ND
        return states

    def _read(self, tokens: Sequence[int]) -> None:
        """Let every slot hold full depth's entries of all tokens."""
        self._kv.reserve(len(tokens))
        window = prefill_window(0, 0, len(tokens), self.stack.heads_per_key, self._kv.keys_LSGCH)
        x_1TD = self.stack.embed(upload([tokens], self.stack.device), window.positions_BT)
        rotary = self.stack.rotary(x_1TD, window.positions_BT)
        self._kv.open(window)
        self.stack.run_layers(0, self.stack.layers, x_1TD, rotary, window, self._kv)
        for slot in range(1, SIDE_BY_SIDE):
            self._kv.move(0, slot, len(tokens))

    def _run(
        self, tokens: Sequence[int], positions: range, exits: Sequence[int]
    ) -> list[tuple[int, Tensor]]:
        ids_N1 = upload([[tokens[position]] for position in positions], self.stack.device)
        positions_N1 = upload([[position] for position in positions], self.stack.device)
        x_N1D = self.stack.embed(ids_N1, positions_N1)
        rotary = self.copy.rotary(x_N1D, positions_N1)
        window = decode_window(range(len(positions)), positions, self.stack.heads_per_key, x_N1D)
        self._kv.open(window)
        states, index = [], 0
        for layer in exits:
            x_N1D = self.copy.run_layers(index, int(layer), x_N1D, rotary, window, self._kv)
            states.append((layer, x_N1D[:, 0]))
            index = int(layer)
        return states
