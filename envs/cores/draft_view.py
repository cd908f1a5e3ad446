"""What draft-and-verify episodes observe: features, what the engine knows anyway, and trust.

Shape suffixes: B parallel episodes, K some of them, D observation columns, C columns of outlook.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.features import KEEP, OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts.draft_trust import ODDS_SCALE
from offramp.envs.cores.batch import IndexArray
from offramp.envs.cores.draft_tables import DraftTables

FEATURES = SOFTMAX_V2.width
COLUMNS = FEATURES + OUTLOOK_V1.width + 3
"""Features, outlook, odds, trust, place."""

AGREES, RUN_LENGTH, DEPTH = (SOFTMAX_V2.index(name) for name in ("agrees", "run_length", "depth"))

STEP_SCALE = 256.0
"""Tokens, the unit of the outlook's ``step`` and ``left``."""

STEP, LEFT, PENDING, DEBT, ACCEPTANCE, LAST_DEPTH, ACTIVE, _WAITING = range(OUTLOOK_V1.width)


class DraftView:
    """The columns of B episodes that depend on their past, and their observations.

    Args:
        num_envs: Number B of parallel episodes.
        tables: The recorded tokens.
        max_pending: Drafts that may be open.
    """

    def __init__(self, num_envs: int, tables: DraftTables, max_pending: int) -> None:
        self._tables = tables
        self._max_pending = max_pending
        self._exits = tables.right_NE.shape[1]
        self._best_B = np.full(num_envs, -1, np.int64)  # token of the last probe
        self._run_B = np.zeros(num_envs, np.float32)  # probes since that agreed with it
        self._debt_B = np.zeros(num_envs, np.float32)
        self._acceptance_B = np.ones(num_envs, np.float32)
        self._last_depth_B = np.ones(num_envs, np.float32)
        self._trust_B = np.ones(num_envs, np.float32)

    def probed(
        self, place_K: IndexArray, token_K: IndexArray, before_K: IndexArray, here_K: IndexArray
    ) -> None:
        """Exits were asked at; what their token is compared to is the last exit asked at before.

        One on the copy is none to compare an exit of the model's own layers to.
        """
        on_copy_D = self._tables.on_copy_D
        self.begin_token(place_K[on_copy_D[before_K + 1] & ~on_copy_D[here_K + 1]])
        best_K = self._tables.token_NE[token_K, here_K]
        agrees_K = best_K == self._best_B[place_K]
        self._run_B[place_K] = np.where(agrees_K, self._run_B[place_K] + 1, 0)
        self._best_B[place_K] = best_K

    def begin_token(self, place_K: IndexArray) -> None:
        """A new token: nothing is probed yet."""
        self._best_B[place_K] = -1
        self._run_B[place_K] = 0

    def begin(self, place_K: IndexArray) -> None:
        """A new completion: its first token came from the prompt, at full depth."""
        self._debt_B[place_K] = 0
        self._acceptance_B[place_K] = 1
        self._last_depth_B[place_K] = 1
        self._trust_B[place_K] = 1

    def drafted(self, place_K: IndexArray, depth_K: IndexArray, chance_K: FloatArray) -> None:
        """A token left early, after so many layers, with such a chance of being right."""
        share_K = (depth_K / self._tables.depth_D[-1]).astype(np.float32)
        self._last_depth_B[place_K] = share_K
        self._debt_B[place_K] = KEEP * self._debt_B[place_K] + (1 - KEEP) * (1 - share_K)
        self._trust_B[place_K] *= chance_K
        self.begin_token(place_K)

    def verified(self, place_K: IndexArray, right_K: IndexArray, pending_K: IndexArray) -> None:
        """A token ran all layers, and the drafts before it were judged."""
        self._last_depth_B[place_K] = 1
        self._debt_B[place_K] *= KEEP
        self._trust_B[place_K] = 1
        missing_K = (1 - self._acceptance_B[place_K]) * np.float32(KEEP) ** right_K
        wrong_K = np.where(right_K < pending_K, KEEP, 1.0)
        self._acceptance_B[place_K] = (1 - missing_K) * wrong_K

    def observe(
        self, place_K: IndexArray, token_K: IndexArray, here_K: IndexArray, pending_K: IndexArray
    ) -> FloatArray:
        """Observations [K, D] at these tokens and exits (−1: before the first layer)."""
        tables = self._tables
        token_K = np.minimum(token_K, len(tables.first_N) - 1)  # of one that is over
        obs_KD = np.zeros((len(place_K), COLUMNS), np.float32)
        asked_K = np.flatnonzero(here_K >= 0)
        here = here_K[asked_K]
        run_K = self._run_B[place_K[asked_K]]
        obs_KD[asked_K, :AGREES] = tables.sure_NES[token_K[asked_K], here]
        obs_KD[asked_K, AGREES] = run_K > 0
        obs_KD[asked_K, RUN_LENGTH] = run_K / self._exits
        obs_KD[asked_K, DEPTH] = tables.depth_D[here + 1] / tables.depth_D[-1]
        outlook_KC = obs_KD[:, FEATURES:-3]
        obs_KD[asked_K, -3] = tables.odds_NE[token_K[asked_K], here] / ODDS_SCALE
        outlook_KC[:, STEP] = (token_K - tables.first_N[token_K] + 1) / STEP_SCALE
        outlook_KC[:, LEFT] = (tables.end_N[token_K] - token_K) / STEP_SCALE
        outlook_KC[:, PENDING] = pending_K / self._max_pending
        outlook_KC[:, DEBT] = self._debt_B[place_K]
        outlook_KC[:, ACCEPTANCE] = self._acceptance_B[place_K]
        outlook_KC[:, LAST_DEPTH] = self._last_depth_B[place_K]
        outlook_KC[:, ACTIVE] = 1
        obs_KD[:, -2] = self._trust_B[place_K]
        obs_KD[:, -1] = (here_K + 1) / self._exits
        return obs_KD
