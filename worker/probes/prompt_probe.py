"""PROMPT_V1: what a policy for prompts sees of the tokens of a chunk, without a head.

Shape suffixes: T tokens still in the stack, D width, F features, S statistics of a state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import PROMPT_V1, BoolArray, FloatArray
from offramp.worker.model.transfers import fetch, take

TINY = 1e-30
"""Added to squares that divide or whose logarithm is taken."""

SCALE = 256
"""Tokens that count as 1: a power of two, so that places stay exact in float32."""


class PromptProbe:
    """PROMPT_V1 of one chunk's tokens: their states against those at the exit before, and where and
    how new they are.

    Args:
        x_TD: Their embeddings.
        prompt: The whole prompt, token ids.
        first: Position of the chunk's first token.
        layers: Layers of the model.
    """

    def __init__(self, x_TD: Tensor, prompt: Sequence[int], first: int, layers: int) -> None:
        self._layers = layers
        self._last_TD = x_TD.float()
        positions_T = np.arange(first, first + len(x_TD))
        seen_T, pair_T = _novelty(prompt[: first + len(x_TD)], first)
        ahead_T = (len(prompt) - 1 - positions_T) / SCALE
        self._known_TF = np.stack([seen_T, pair_T, positions_T / SCALE, ahead_T], 1)

    def features(self, layer: int, x_TD: Tensor) -> FloatArray:
        """All columns of PROMPT_V1 after ``layer`` layers, [T, F]."""
        state_TD, last_TD = x_TD.float(), self._last_TD
        square_T = (state_TD * state_TD).sum(-1) + TINY
        last_T = (last_TD * last_TD).sum(-1) + TINY
        rms_T = (square_T / state_TD.shape[-1]).sqrt()
        columns = (
            # The product of two zero states' squares would be 0 in float32, that of roots is not.
            (state_TD * last_TD).sum(-1) / (square_T.sqrt() * last_T.sqrt()),
            0.5 * (square_T / last_T).log(),
            ((state_TD - last_TD).square().sum(-1) / square_T).sqrt(),
            rms_T.log(),
            (state_TD.abs().amax(-1) / rms_T + TINY).log(),
        )
        # The layers may write into the states that they were given.
        self._last_TD = state_TD.clone() if state_TD is x_TD else state_TD
        [statistics_TS] = fetch(torch.stack(columns, dim=1))
        out_TF = np.empty((len(x_TD), PROMPT_V1.width), np.float32)
        kinds = len(columns)
        out_TF[:, :kinds] = statistics_TS.numpy()
        out_TF[:, kinds:-1] = self._known_TF
        out_TF[:, -1] = layer / self._layers
        return out_TF

    def keep(self, stay_T: BoolArray) -> None:
        """Forget the tokens that left."""
        self._last_TD = take(self._last_TD, np.flatnonzero(stay_T).tolist())
        self._known_TF = self._known_TF[stay_T]


def _novelty(tokens: Sequence[int], first: int) -> tuple[BoolArray, BoolArray]:
    """Whether each token from ``first`` on, and each with the one before it, occurred before."""
    seen: set[int] = set()
    pairs: set[tuple[int, int]] = set()
    known = np.zeros((2, len(tokens)), np.bool_)
    before = -1
    for place, token in enumerate(tokens):
        known[:, place] = token in seen, (before, token) in pairs
        seen.add(token)
        pairs.add((before, token))
        before = token
    return known[0, first:], known[1, first:]
