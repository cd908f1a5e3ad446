"""Many token-exit episodes at once, in numpy: the one implementation behind every adapter.

Shape suffixes: B parallel episodes, K of them that ended, D = F + 1 observation columns,
N tokens, E exits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.tokens import Quality, TokenTraces

RewardArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

GO_ON, LEAVE = 0, 1
"""The two actions."""

LAMBDA_LIMITS = (1e-6, 1e6)
"""Preferences outside are refused: the observation's declared bounds rest on it."""

DEFAULT_LAMBDA_RANGE = (0.01, 1.0)
"""From "1 % of a full token's time for 0.0001 quality" to "a full token's time for all of it"."""

FEATURE_LIMIT = 100.0
"""Largest magnitude of a feature: the observation's declared bounds rest on it."""


@dataclass(frozen=True, slots=True)
class Finals:
    """The K episodes that ended in this step, in ascending order of place.

    Attributes:
        place_K: Which of the B parallel episodes, int64.
        obs_KD: The observation that the last action answered, float32.
        info: Columns [K] by name: ``quality`` in [0, 1]; ``cost`` in units of the full-depth
            token's time; ``exit_layer`` in layers executed; ``agree`` 1 if the token is the
            full-depth one; ``token`` row of the traces; ``lambda`` the preference. Counts are
            int64, the rest float64.
    """

    place_K: IndexArray
    obs_KD: FloatArray
    info: dict[str, NDArray[Any]]

    def rows(self) -> list[dict[str, float | int]]:
        """The info columns as one dict per ended episode."""
        columns = zip(*(column.tolist() for column in self.info.values()), strict=True)
        return [dict(zip(self.info, row, strict=True)) for row in columns]


class StepBatch(NamedTuple):
    """What one step of all B episodes gives; every array is new, never reused.

    Attributes:
        obs_BD: Next observations; of the next episode where one ended (with autoreset), float32.
        reward_B: Rewards, float64.
        terminated_B: Where an episode ended.
        finals: About those that ended.
    """

    obs_BD: FloatArray
    reward_B: RewardArray
    terminated_B: BoolArray
    finals: Finals


class TokenExitCore:
    """B parallel episodes, each one token on its way through the exits.

    ``TokenExitEnv`` documents observations, actions and reward. Tokens are drawn uniformly with
    replacement and λ log-uniformly, from one PCG64 generator, in order of place.

    Args:
        traces: Recorded tokens.
        costs: Measured costs of the model that was recorded.
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest preference λ; equal for a single one.
        quality: How an exit's token is scored.
        autoreset: Start the next episode in the step that ends one.

    Raises:
        ConfigError: an argument is out of range, or the costs are of another model depth.
        TraceError: a feature lies beyond the declared bounds.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        lambda_range: tuple[float, float] = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
        autoreset: bool = True,
    ) -> None:
        _check_arguments(traces, costs, num_envs, lambda_range)
        self.num_envs = num_envs
        self.num_columns = traces.features_NEF.shape[2] + 1
        self.rng = np.random.default_rng()
        self._autoreset = autoreset
        self._log_range = (math.log(lambda_range[0]), math.log(lambda_range[1]))
        self._set_tables(traces, costs, quality)
        self.reset()

    def _set_tables(self, traces: TokenTraces, costs: CostTable, quality: Quality) -> None:
        tokens, exits, width = traces.features_NEF.shape
        full_N1 = np.ones((tokens, 1), np.float32)
        self._tokens = tokens
        self._exits = exits
        self._features_RF = traces.features_NEF.reshape(tokens * exits, width)
        self._quality_NE1 = traces.quality(quality)
        self._agree_NE1 = np.concatenate([traces.agree_NE, full_N1], axis=1)
        self._cost_E1 = costs.leaving(traces.header.exits).astype(np.float64)
        self._paid_E = np.concatenate([[0.0], self._cost_E1[: exits - 1]])
        self._layer_E1 = np.array([*traces.header.exits, traces.header.layers], np.int64)

    def reset(
        self,
        seed: int | np.random.Generator | None = None,
        *,
        tokens: ArrayLike | None = None,
        lambdas: ArrayLike | None = None,
    ) -> FloatArray:
        """Start B new episodes and return their observations [B, D].

        Args:
            seed: New seed or generator; None goes on with the present one.
            tokens: Rows of the traces to start with, one or B; None draws them.
            lambdas: Preferences to start with, one or B; None draws them.

        Raises:
            ConfigError: a token or preference is out of range.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self._token_B = np.zeros(self.num_envs, np.int64)
        self._exit_B = np.zeros(self.num_envs, np.int64)
        self._log_lambda_B = np.zeros(self.num_envs, np.float32)
        self._lambda_B = np.ones(self.num_envs, np.float64)
        everyone = np.arange(self.num_envs)
        self._begin(everyone)
        if tokens is not None:
            self._token_B[:] = self._checked_tokens(tokens)
        if lambdas is not None:
            self._set_log_lambda(everyone, np.log(self._checked_lambdas(lambdas)))
        return self._observe(everyone)

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode: 0 goes on, 1 leaves.

        Raises:
            ConfigError: not B whole numbers of 0 and 1.
        """
        leave_B = self._checked_actions(actions_B) == LEAVE
        at_last_B = self._exit_B == self._exits - 1
        terminated_B = leave_B | at_last_B
        column_B = self._exit_B + (at_last_B & ~leave_B)
        paid_B = self._cost_E1[column_B] - self._paid_E[self._exit_B]
        reward_B = -self._lambda_B * paid_B
        ended_K = np.flatnonzero(terminated_B)
        finals = self._end(ended_K, column_B[ended_K])
        reward_B[ended_K] += finals.info["quality"]
        reward_B /= 1 + self._lambda_B
        self._exit_B += ~terminated_B
        if self._autoreset:
            self._begin(ended_K)
        return StepBatch(self._observe(np.arange(self.num_envs)), reward_B, terminated_B, finals)

    def _begin(self, place_K: IndexArray) -> None:
        self._exit_B[place_K] = 0
        self._token_B[place_K] = self.rng.integers(self._tokens, size=len(place_K))
        self._set_log_lambda(place_K, self.rng.uniform(*self._log_range, size=len(place_K)))

    def _set_log_lambda(self, place_K: IndexArray, log_lambda_K: RewardArray) -> None:
        self._log_lambda_B[place_K] = log_lambda_K
        # λ comes from the rounded logarithm, so that the observation tells it exactly.
        self._lambda_B[place_K] = np.exp(self._log_lambda_B[place_K].astype(np.float64))

    def _observe(self, place_K: IndexArray) -> FloatArray:
        obs_KD = np.empty((len(place_K), self.num_columns), np.float32)
        row_K = self._token_B[place_K] * self._exits + self._exit_B[place_K]
        obs_KD[:, :-1] = self._features_RF[row_K]
        obs_KD[:, -1] = self._log_lambda_B[place_K]
        return obs_KD

    def _end(self, place_K: IndexArray, column_K: IndexArray) -> Finals:
        token_K = self._token_B[place_K]
        info: dict[str, NDArray[Any]] = {
            "quality": self._quality_NE1[token_K, column_K].astype(np.float64),
            "cost": self._cost_E1[column_K],
            "exit_layer": self._layer_E1[column_K],
            "agree": self._agree_NE1[token_K, column_K].astype(np.float64),
            "token": token_K,
            "lambda": self._lambda_B[place_K],
        }
        return Finals(place_K, self._observe(place_K), info)

    def _checked_actions(self, actions_B: NDArray[Any]) -> NDArray[Any]:
        actions = np.asarray(actions_B)
        whole = actions.dtype.kind in "iu"
        if not whole or actions.shape != (self.num_envs,):
            raise ConfigError(
                "actions",
                f"have shape {actions.shape} and type {actions.dtype}",
                f"Give {self.num_envs} whole numbers",
            )
        if not ((actions == GO_ON) | (actions == LEAVE)).all():
            wrong = actions[(actions != GO_ON) & (actions != LEAVE)][0]
            raise ConfigError("actions", f"hold {wrong}", "Use 0 to go on and 1 to leave")
        return actions

    def _checked_tokens(self, tokens: ArrayLike) -> IndexArray:
        values = np.asarray(tokens, np.int64)
        if ((values < 0) | (values >= self._tokens)).any():
            raise ConfigError("token", f"must be from 0 to {self._tokens - 1}")
        return values

    def _checked_lambdas(self, lambdas: ArrayLike) -> RewardArray:
        values = np.asarray(lambdas, np.float64)
        low, high = LAMBDA_LIMITS
        if not ((values >= low) & (values <= high)).all():
            raise ConfigError("lambda", f"must be from {low:g} to {high:g}")
        return values


def _check_arguments(
    traces: TokenTraces, costs: CostTable, num_envs: int, lambda_range: tuple[float, float]
) -> None:
    low, high = lambda_range
    if num_envs < 1:
        raise ConfigError("num_envs", f"{num_envs} is below 1")
    if not LAMBDA_LIMITS[0] <= low <= high <= LAMBDA_LIMITS[1]:
        raise ConfigError(
            "lambda_range",
            f"({low}, {high}) is no range within {LAMBDA_LIMITS}",
            "Give the lower end first",
        )
    if costs.layers != traces.header.layers:
        raise ConfigError(
            "costs",
            f"are of a model with {costs.layers} layers, the traces of {traces.header.layers}",
            "Measure the model that was recorded",
        )
    largest = max(traces.features_NEF.max(), -traces.features_NEF.min())
    if not largest <= FEATURE_LIMIT:
        raise TraceError("features_NEF", f"reach {largest}, beyond ±{FEATURE_LIMIT:g}")
