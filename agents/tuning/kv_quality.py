"""What the fill destroys: tokens of full depth that read filled entries, on held-out documents.

Many tokens of a document leave after one exit, at random. Layers up to there run every token, so
the states at the exit are full depth's own, and one causal pass over the deeper layers computes
what decoding would: those that left are there by the entries that were filled for them.

Shape suffixes: T tokens, D width, G key/value heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.worker.model.filling.kv_map import UNMAPPED, KVMap
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.stack import LayerStack

LEAVING = 0.8
"""Share of tokens that leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FillQuality:
    """One exit, where most of the tokens left.

    Attributes:
        layer: Layers executed before it.
        tokens: Tokens that stayed, in all documents.
        plain: Share of them whose most likely successor is no more the one of an exact cache,
            filled as if each exit's state had reached every layer.
        mapped: The same, filled through the map.
    """

    layer: int
    tokens: int
    plain: float
    mapped: float


class FilledTokens:
    """A cache of one causal pass in which some tokens' entries are filled, not computed.

    Args:
        left_T: Says which tokens left.
        first: Index of the first layer that they did not run.
        keys_TLGH, values_TLGH: Their entries from there on; those of other tokens are not read.
    """

    def __init__(self, left_T: Tensor, first: int, keys_TLGH: Tensor, values_TLGH: Tensor) -> None:
        self._left_T, self._first, self._filled = left_T, first, (keys_TLGH, values_TLGH)

    def update(
        self, keys_1GTH: Tensor, values_1GTH: Tensor, layer: int, /, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """What a layer attends to."""
        place, left_T1 = layer - self._first, self._left_T[:, None]
        filled = [each_TLGH[:, place].transpose(0, 1)[None] for each_TLGH in self._filled]
        keys_1GTH = torch.where(left_T1, filled[0], keys_1GTH)
        return keys_1GTH, torch.where(left_T1, filled[1], values_1GTH)


@torch.inference_mode()
def compare_fills(
    stack: LayerStack,
    kv_map: KVMap,
    documents: Sequence[Sequence[int]],
    seed: int,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[FillQuality]:
    """What plain filling destroys at each of the map's exits, and what is left to the map.

    Args:
        stack: The model.
        kv_map: What was fitted.
        documents: Token ids of held-out documents.
        seed: Draws which tokens leave.
        on_progress: Told of "check", in documents.
    """
    projector, generator = KVProjector(stack), torch.Generator().manual_seed(seed)
    stayed, wrong = 0, {layer: [0, 0] for layer in kv_map.by_exit}
    for number, tokens in enumerate(documents):
        left_T = torch.rand(len(tokens), generator=generator) < LEAVING
        stayed += int((~left_T).sum())
        states, rotary, said_T = full_depth(stack, tokens, tuple(wrong))
        for layer, x_TD in states.items():
            before_TK = projector.values_before(x_TD, layer)
            for place, through in enumerate((UNMAPPED, kv_map)):
                entries = projector.project(x_TD, layer, by_token(rotary), through, before_TK)
                filled = FilledTokens(left_T.to(stack.device), layer, *entries)
                found_T = said_over(stack, filled, x_TD, layer, rotary)
                wrong[layer][place] += int((found_T != said_T)[~left_T].sum())
        on_progress("check", number + 1, len(documents))
    return [
        FillQuality(layer=layer, tokens=stayed, plain=plain / stayed, mapped=mapped / stayed)
        for layer, (plain, mapped) in wrong.items()
    ]


def said_over(
    stack: LayerStack, filled: FilledTokens, x_TD: Tensor, layer: int, rotary: tuple[Tensor, ...]
) -> Tensor:
    """The most likely successors [T] of tokens that run on from an exit over a filled cache."""
    x_1TD = x_TD[None]
    for index in range(layer, stack.layers):
        x_1TD = stack.run_layer(index, x_1TD, rotary, None, filled)
    return stack.logits(x_1TD[0]).argmax(-1).cpu()


def full_depth(
    stack: LayerStack, tokens: Sequence[int], exits: Sequence[int]
) -> tuple[dict[int, Tensor], tuple[Tensor, ...], Tensor]:
    """States [T, D] after each exit, the positions' angles, and the most likely successors."""
    tokens_1T = torch.tensor([list(tokens)], device=stack.device)
    positions_1T = torch.arange(len(tokens), device=stack.device)[None]
    x_1TD = stack.embed(tokens_1T, positions_1T)
    rotary, states = stack.rotary(x_1TD, positions_1T), {}
    for index in range(stack.layers):
        x_1TD = stack.run_layer(index, x_1TD, rotary, None, None)
        if index + 1 in exits:
            states[index + 1] = x_1TD[0]
    return states, rotary, stack.logits(x_1TD[0]).argmax(-1).cpu()


def by_token(rotary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Angles [1, T, H] as those of T rows of one token each."""
    return tuple(part.transpose(0, 1) for part in rotary)
