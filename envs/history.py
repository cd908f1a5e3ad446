"""What a row has been through: the columns of OUTLOOK_V1, kept as the engine keeps them.

Shape suffixes: B rows, K of them, C columns of outlook.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.features import OUTLOOK_V1, FloatArray
from offramp.envs.batch import IndexArray, RewardArray

KEEP = 0.9
"""Share of a moving average that outlives one token (OUTLOOK_V1)."""

TOKENS = 256
"""Unit of ``step`` and ``left`` (OUTLOOK_V1)."""

STEP, LEFT, PENDING, DEBT, ACCEPTANCE, LAST_DEPTH, ACTIVE = map(
    OUTLOOK_V1.index, ("step", "left", "pending", "debt", "acceptance", "last_depth", "active")
)


class History:
    """B rows, as they stand before their next token.

    Args:
        num_envs: Number B.

    Attributes:
        step_B: Tokens decided.
        left_B: Tokens to come.
        debt_B: Moving average of the share of layers that its tokens skipped, in [0, 1].
        outlook_BC: The columns as observed, float32; ``pending``, ``active`` and ``waiting`` are
            left to whoever knows them.
    """

    def __init__(self, num_envs: int) -> None:
        self.step_B = np.zeros(num_envs, np.int64)
        self.left_B = np.zeros(num_envs, np.int64)
        self.debt_B = np.zeros(num_envs, np.float64)
        self.outlook_BC: FloatArray = np.zeros((num_envs, OUTLOOK_V1.width), np.float32)
        # Only policies that learn while serving, and drafts, are told what full depth says.
        self.outlook_BC[:, ACCEPTANCE] = 1

    def begin(self, place_K: IndexArray, left_K: IndexArray) -> None:
        """After a prompt, which ran all layers and gave the first token."""
        self.step_B[place_K] = 0
        self.left_B[place_K] = left_K
        self.debt_B[place_K] = 0
        self._show(place_K, np.ones(len(place_K)))

    def add(self, place_K: IndexArray, depth_K: RewardArray) -> None:
        """One more token of some rows, after ``depth_K`` of the layers (a share)."""
        self.step_B[place_K] += 1
        self.left_B[place_K] -= 1
        self.debt_B[place_K] = KEEP * self.debt_B[place_K] + (1 - KEEP) * (1 - depth_K)
        self._show(place_K, depth_K)

    def _show(self, place_K: IndexArray, depth_K: RewardArray) -> None:
        # The prompt's own token has been emitted before the first decision.
        self.outlook_BC[place_K, STEP] = (self.step_B[place_K] + 1) / TOKENS
        self.outlook_BC[place_K, LEFT] = self.left_B[place_K] / TOKENS
        self.outlook_BC[place_K, DEBT] = self.debt_B[place_K]
        self.outlook_BC[place_K, LAST_DEPTH] = depth_K
