"""What a token's observation would be in every state of its stopping problem.

Shape suffixes: N tokens, S states, F feature columns, D = F + 1 observation columns.
"""

from __future__ import annotations

import math

import numpy as np

from offramp.agents.learning.export import Normaliser
from offramp.agents.learning.stopping_problem import START, State
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.envs.traces.pairs import PairFeatures, schema_of
from offramp.envs.traces.tokens import TokenTraces

SAMPLED = 4096
"""Tokens that the normalisation is fitted on."""

UNREAD = "run_length"
"""Depends on the whole path, where a state knows one step of it: jumping actors do not read it."""


class StateObservations:
    """Observations of ``TokenExitCore`` with ``jump`` actions, for every state at once.

    Args:
        traces: Recorded tokens, each probed at every exit.
        states: Where a token can be asked, the start first.

    Raises:
        TraceError: the schema has a column that cannot be had for a jump.
    """

    def __init__(self, traces: TokenTraces, states: tuple[State, ...]) -> None:
        self.traces = traces
        self.schema = schema_of(traces.header)
        self._pairs = PairFeatures(traces)
        self._here_S = np.asarray([state.here for state in states])
        self._before_S = np.asarray([state.before for state in states])

    def of(self, rows_N: IndexArray, log_lambda_N: FloatArray) -> FloatArray:
        """Observations of some tokens under some preferences, [N, S, D]."""
        rows_N1 = rows_N[:, None]
        here_S = np.maximum(self._here_S, 0)
        width = self.schema.width
        obs_NSD = np.empty((len(rows_N), len(here_S), width + 1), np.float32)
        obs_NSD[:, :, :width] = self.traces.features_NEF[rows_N1, here_S]
        compared = self._pairs.values_NPEQ[rows_N1, self._before_S + 1, here_S]
        obs_NSD[:, :, self._pairs.columns] = compared
        obs_NSD[:, self._here_S == START, :width] = 0
        obs_NSD[:, :, width] = log_lambda_N[:, None]
        return obs_NSD

    def at(self, state: State, rows_N: IndexArray | None = None) -> FloatArray:
        """Features of some tokens, or of all, in one state at an exit, [N, F]."""
        rows = slice(None) if rows_N is None else rows_N
        features_NF = self.traces.features_NEF[rows, state.here].copy()
        compared = self._pairs.values_NPEQ[rows, state.before + 1, state.here]
        features_NF[:, self._pairs.columns] = compared
        return features_NF

    def normaliser(self, lambda_range: tuple[float, float], seed: int) -> Normaliser:
        """Fitted on a sample of tokens in all states; log λ in closed form; UNREAD is left out."""
        rng = np.random.default_rng(seed)
        rows_N = rng.choice(len(self.traces), min(SAMPLED, len(self.traces)), replace=False)
        obs_NSD = self.of(rows_N, np.zeros(len(rows_N), np.float32))[:, self._here_S != START]
        fitted = Normaliser.fit(obs_NSD.reshape(-1, obs_NSD.shape[2]))
        low, high = (math.log(value) for value in lambda_range)
        mean_D, std_D = fitted.mean_F.copy(), fitted.std_F.copy()
        # Mean and deviation of a uniform distribution.
        mean_D[-1], std_D[-1] = (low + high) / 2, max((high - low) / math.sqrt(12), 1.0)
        if UNREAD in self.schema.columns:
            std_D[self.schema.index(UNREAD)] = np.inf
        return Normaliser(mean_D, std_D)
