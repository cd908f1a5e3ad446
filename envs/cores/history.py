"""What a row has been through: the columns of OUTLOOK_V1, kept as the engine keeps them.

Shape suffixes: B rows, K of them, C columns of outlook, E1 = exits and full depth.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.features import KEEP, OUTLOOK_V1, FloatArray
from offramp.envs.cores.batch import IndexArray, RewardArray

TOKENS = 256
"""Unit of ``step`` and ``left`` (OUTLOOK_V1)."""

STEP, LEFT, PENDING, DEBT, ACCEPTANCE, LAST_DEPTH, ACTIVE = map(
    OUTLOOK_V1.index, ("step", "left", "pending", "debt", "acceptance", "last_depth", "active")
)


class History:
    """B rows, as they stand before their next token.

    Args:
        num_envs: Number B of rows.
        layer_E1: Layers executed at each exit and at full depth.

    Attributes:
        step_B: Tokens that each row has decided.
        left_B: Tokens to come.
        debt_BE1: Moving average of the layers that its tokens skipped of those up to each exit,
            as a share of all layers: what a token that leaves there reads of projected entries.
            At the first exit 0, at full depth OUTLOOK_V1's ``debt``.
        outlook_BC: The columns as observed, float32; ``pending``, ``active`` and ``waiting`` are
            left to whoever knows them.
    """

    def __init__(self, num_envs: int, layer_E1: RewardArray) -> None:
        self.step_B = np.zeros(num_envs, np.int64)
        self.left_B = np.zeros(num_envs, np.int64)
        self.debt_BE1 = np.zeros((num_envs, len(layer_E1)), np.float64)
        self._share_E1 = layer_E1 / layer_E1[-1]
        self.outlook_BC: FloatArray = np.zeros((num_envs, OUTLOOK_V1.width), np.float32)
        # Only policies that learn while serving, and drafts, are told what full depth says.
        self.outlook_BC[:, ACCEPTANCE] = 1

    def begin(self, place_K: IndexArray, left_K: IndexArray) -> None:
        """After a prompt, which ran all layers and gave the first token."""
        self.step_B[place_K] = 0
        self.left_B[place_K] = left_K
        self.debt_BE1[place_K] = 0
        self._show(place_K, np.ones(len(place_K)))

    def add(self, place_K: IndexArray, depth_K: RewardArray) -> None:
        """One more token of some rows, after ``depth_K`` of the layers (a share)."""
        self.step_B[place_K] += 1
        self.left_B[place_K] -= 1
        skipped_KE1 = np.maximum(0.0, self._share_E1 - depth_K[:, None])
        self.debt_BE1[place_K] = KEEP * self.debt_BE1[place_K] + (1 - KEEP) * skipped_KE1
        self._show(place_K, depth_K)

    def _show(self, place_K: IndexArray, depth_K: RewardArray) -> None:
        # The prompt's own token has been emitted before the first decision.
        self.outlook_BC[place_K, STEP] = (self.step_B[place_K] + 1) / TOKENS
        self.outlook_BC[place_K, LEFT] = self.left_B[place_K] / TOKENS
        self.outlook_BC[place_K, DEBT] = self.debt_BE1[place_K, -1]
        self.outlook_BC[place_K, LAST_DEPTH] = depth_K
