"""Many token-exit episodes at once, in numpy: the one implementation behind every adapter.

Shape suffixes: B parallel episodes, K of them that ended, D = F + W observation columns (features,
weights), N tokens, E exits, E1 = exits and full depth, R = N · E rows of features, O objectives
that cost (latency; energy if known), V = 1 + O objectives of a reward vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.actions import ActionKind, Actions
from offramp.envs.batch import Finals, IndexArray, RewardArray, StepBatch
from offramp.envs.pairs import PairFeatures
from offramp.envs.tariff import ENERGY, LATENCY, Tariff, require_same_model
from offramp.envs.tokens import Quality, TokenTraces
from offramp.envs.weights import DEFAULT_LAMBDA_RANGE, Range, Weights

FEATURE_LIMIT = 100.0
"""Largest magnitude of a feature: the observation's declared bounds rest on it."""


class TokenExitCore:
    """B parallel episodes, each one token on its way through the exits.

    ``TokenExitEnv`` documents observations, actions and reward. Tokens are drawn uniformly with
    replacement and the weights log-uniformly, from one PCG64 generator, in order of place.

    Args:
        traces: Recorded tokens.
        costs: Measured costs of the model that was recorded.
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest weight λ of latency; equal for a single one.
        quality: How an exit's token is scored.
        autoreset: Start the next episode in the step that ends one.
        actions: ``gate`` (go on or leave) or ``jump`` (leave, or which exit to probe next).
        jumps: Of ``jump``: the longest, in exits; None allows all.
        asks_first: Of ``jump``: begin before the first layer, choosing the first exit to probe.
        ends: Of ``jump``: one more action, full depth from wherever it stands.
        energy_range: Lowest and highest weight μ of energy; None does not weigh it.

    Attributes:
        actions: What can be done.
        num_columns: Number D of observation columns.
        objectives: Names of the V entries of a reward vector.

    Raises:
        ConfigError: an argument is out of range, or the costs are of another model.
        TraceError: a feature lies beyond the declared bounds, or cannot be had for jumps.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        lambda_range: Range = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
        autoreset: bool = True,
        actions: ActionKind = "gate",
        jumps: int | None = None,
        asks_first: bool = False,
        ends: bool = False,
        energy_range: Range | None = None,
    ) -> None:
        check_arguments(traces, costs, num_envs)
        tokens, exits, width = traces.features_NEF.shape
        tariff = Tariff.of(costs, traces.header.exits)
        self.num_envs = num_envs
        self.objectives = tariff.objectives
        self.rng = np.random.default_rng()
        self.actions = Actions(actions, exits, jumps, asks_first, ends)
        self.weights = Weights(num_envs, lambda_range, energy_range, "energy" in self.objectives)
        self.num_columns = width + len(self.weights.names)
        self._autoreset = autoreset
        self._first = -1 if asks_first else 0
        self._tokens, self._exits, self._width = tokens, exits, width
        self._pairs = PairFeatures(traces) if self.actions.is_jump else None
        self._set_tables(traces, tariff, quality)
        self.reset()

    def _set_tables(self, traces: TokenTraces, tariff: Tariff, quality: Quality) -> None:
        full_N1 = np.ones((self._tokens, 1), np.float32)
        self._features_RF = traces.features_NEF.reshape(-1, self._width)
        self._quality_NE1 = traces.quality(quality)
        self._agree_NE1 = np.concatenate([traces.agree_NE, full_N1], axis=1)
        self._leave_PO = tariff.leave_OP.T.copy()
        self._decide_O = tariff.probe_O + tariff.policy_O
        self._policy_O = tariff.policy_O
        self._build_O = tariff.build_O
        self._layer_E1 = np.array([*traces.header.exits, traces.header.layers], np.int64)

    def reset(
        self,
        seed: int | np.random.Generator | None = None,
        *,
        tokens: ArrayLike | None = None,
        lambdas: ArrayLike | None = None,
        mus: ArrayLike | None = None,
    ) -> FloatArray:
        """Start B new episodes and return their observations [B, D].

        Args:
            seed: New seed or generator; None goes on with the present one.
            tokens: Rows of the traces to start with, one or B; None draws them.
            lambdas: Weights of latency to start with, one or B; None draws them.
            mus: Weights of energy.

        Raises:
            ConfigError: a token or weight is out of range.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self._token_B = np.zeros(self.num_envs, np.int64)
        self._exit_B = np.zeros(self.num_envs, np.int64)  # where it stands
        self._before_B = np.full(self.num_envs, -1, np.int64)  # what was probed before
        self._run_B = np.zeros(self.num_envs, np.int64)
        self._probes_B = np.zeros(self.num_envs, np.int64)
        self._spent_BO = np.zeros((self.num_envs, len(self._policy_O)), np.float64)
        self._begin(np.arange(self.num_envs))
        if tokens is not None:
            self._token_B[:] = self._checked_tokens(tokens)
        if lambdas is not None:
            self.weights.assign("lambda", lambdas)
        if mus is not None:
            self.weights.assign("mu", mus)
        return self._observe(np.arange(self.num_envs))

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        return self.actions.masks(self._exit_B)

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode.

        Raises:
            ConfigError: not B whole numbers within the actions.
        """
        here_B = self._exit_B
        target_B = self.actions.targets(here_B, self.actions.checked(actions_B, self.num_envs))
        terminated_B = (target_B == here_B) | (target_B == self._exits)
        column_B = np.where(target_B == self._exits, target_B, here_B)
        vector_BV = np.zeros((self.num_envs, len(self.objectives)), np.float64)
        vector_BV[:, 1:] = -self._pay(here_B, column_B)
        ended_K = np.flatnonzero(terminated_B)
        column_K = column_B[ended_K]
        vector_BV[ended_K, 0] = self._quality_NE1[self._token_B[ended_K], column_K]
        reward_B = self.weights.reward(vector_BV)
        finals = self._end(ended_K, column_K)
        self._advance(target_B)
        if self._autoreset:
            self._begin(ended_K)
        obs_BD = self._observe(np.arange(self.num_envs))
        if not self._autoreset:
            obs_BD[ended_K] = finals.obs_KD
        return StepBatch(obs_BD, reward_B, terminated_B, finals, vector_BV)

    def _pay(self, here_B: IndexArray, column_B: IndexArray) -> RewardArray:
        """For the way here, the probe and the decision; to the end if that is where it goes."""
        paid_BO = self._leave_PO[column_B + 1] - self._leave_PO[self._before_B + 1]
        is_probed_B1 = (here_B >= 0)[:, None]
        paid_BO += np.where(is_probed_B1, self._decide_O, self._policy_O)
        paid_BO[(self._probes_B == 0) & (here_B >= 0)] += self._build_O
        self._probes_B += here_B >= 0
        self._spent_BO += paid_BO
        return paid_BO

    def _advance(self, target_B: IndexArray) -> None:
        self._before_B = self._exit_B
        self._exit_B = np.minimum(target_B, self._exits - 1)
        if self._pairs is not None:
            self._run_B += 1
            self._run_B *= self._pairs.agrees_NPE[self._token_B, self._before_B + 1, self._exit_B]

    def _begin(self, place_K: IndexArray) -> None:
        self._exit_B[place_K] = self._first
        self._before_B[place_K] = -1
        self._run_B[place_K] = 0
        self._probes_B[place_K] = 0
        self._spent_BO[place_K] = 0
        self._token_B[place_K] = self.rng.integers(self._tokens, size=len(place_K))
        self.weights.draw(self.rng, place_K)

    def _observe(self, place_K: IndexArray) -> FloatArray:
        obs_KD = np.empty((len(place_K), self.num_columns), np.float32)
        token_K, exit_K = self._token_B[place_K], self._exit_B[place_K]
        obs_KD[:, : self._width] = self._features_RF[token_K * self._exits + exit_K]
        if self._pairs is not None:
            before_K = self._before_B[place_K]
            pairs = self._pairs
            obs_KD[:, pairs.columns] = pairs.values_NPEQ[token_K, before_K + 1, exit_K]
            if pairs.run_column is not None:
                obs_KD[:, pairs.run_column] = self._run_B[place_K] / self._exits
            obs_KD[exit_K < 0, : self._width] = 0
        obs_KD[:, self._width :] = self.weights.log_BW[place_K]
        return obs_KD

    def _end(self, place_K: IndexArray, column_K: IndexArray) -> Finals:
        token_K = self._token_B[place_K]
        info: dict[str, NDArray[Any]] = {
            "quality": self._quality_NE1[token_K, column_K].astype(np.float64),
            "cost": self._spent_BO[place_K, LATENCY],
            "exit_layer": self._layer_E1[column_K],
            "probes": self._probes_B[place_K],
            "agree": self._agree_NE1[token_K, column_K].astype(np.float64),
            "token": token_K,
        }
        if "energy" in self.objectives:
            info["energy"] = self._spent_BO[place_K, ENERGY]
        for w, name in enumerate(self.weights.names):
            info[name] = self.weights.value_BW[place_K, w]
        return Finals(place_K, self._observe(place_K), info)

    def _checked_tokens(self, tokens: ArrayLike) -> IndexArray:
        values = np.asarray(tokens, np.int64)
        if ((values < 0) | (values >= self._tokens)).any():
            raise ConfigError("token", f"must be from 0 to {self._tokens - 1}")
        return values


def check_arguments(traces: TokenTraces, costs: CostTable, num_envs: int) -> None:
    """What every core asks of its arguments.

    Raises:
        ConfigError: no episode, or costs of another model.
        TraceError: a feature that is NaN or beyond the declared bounds.
    """
    if num_envs < 1:
        raise ConfigError("num_envs", f"{num_envs} is below 1")
    require_same_model(costs, traces.header)
    largest = max(traces.features_NEF.max(), -traces.features_NEF.min())
    if not largest <= FEATURE_LIMIT:
        raise TraceError(
            "features_NEF", f"reach {largest}, beyond ±{FEATURE_LIMIT:g}", "Record them again"
        )
