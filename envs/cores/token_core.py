"""Many token-exit episodes at once, in numpy: the one implementation behind every adapter.

Shape suffixes: B parallel episodes, K of them that ended, D = F + W observation columns (features,
weights), N tokens, E1 = exits and full depth, O objectives that cost (latency; energy if known),
V = 1 + O objectives of a reward vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.charges.token_costs import ENERGY, LATENCY, TokenCosts, costs_for
from offramp.envs.charges.tradeoffs import DEFAULT_LAMBDA_RANGE, Range, Weights
from offramp.envs.cores.batch import Finals, IndexArray, RewardArray, StepBatch
from offramp.envs.cores.walk import ActionKind, Actions, Walk
from offramp.envs.traces.pairs import schema_of
from offramp.envs.traces.tokens import Quality, TokenTraces

FEATURE_LIMIT = 100.0
"""Largest magnitude of a feature: the observation's declared bounds rest on it."""


class TokenExitCore:
    """B parallel episodes, each one token on its way through the exits.

    ``TokenExitEnv`` documents observations, actions and reward. Tokens are drawn uniformly with
    replacement and the weights log-uniformly, from one PCG64 generator, in order of place.

    Args:
        traces: Recorded tokens that episodes replay.
        costs: Measured costs of the model that was recorded.
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest weight λ of latency; equal for a single one.
        quality: How an exit's token is scored.
        autoreset: Start the next episode in the step that ends one.
        actions: ``gate`` (go on or leave) or ``jump`` (leave, or which exit to probe next).
        jumps: Longest jump, in exits; None allows all. For ``jump`` only, like the next two.
        asks_first: Begin before the first layer, choosing the first exit to probe.
        ends: Allow one more action, full depth from wherever it stands.
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
        costs = checked_costs(traces, costs, num_envs)
        exits = traces.header.exits
        self._set_up(
            traces,
            [TokenCosts.of(costs, exits, adapters=traces.header.adapters)],
            Actions(actions, len(exits), jumps, asks_first, ends),
            num_envs,
            (lambda_range, energy_range),
            quality,
            autoreset,
        )
        self.num_columns = self._walk.width + len(self.weights.names)
        self.reset()

    def _set_up(
        self,
        traces: TokenTraces,
        token_costs: Sequence[TokenCosts],
        actions: Actions,
        num_envs: int,
        ranges: tuple[Range, Range | None],
        quality: Quality,
        autoreset: bool,
    ) -> None:
        self.num_envs = num_envs
        self.objectives = token_costs[0].objectives
        self.rng = np.random.default_rng()
        self.actions = actions
        self.weights = Weights(num_envs, *ranges, "energy" in self.objectives)
        self._walk = Walk(traces, token_costs, actions, num_envs)
        self._autoreset = autoreset
        self._quality_NE1 = traces.quality(quality)
        self._agree_NE1 = traces.quality("agreement")
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
        everyone = np.arange(self.num_envs)
        self._allocate()
        self._begin(everyone)
        if tokens is not None:
            given = checked_tokens(tokens, len(self._quality_NE1))
            self._place(everyone, np.broadcast_to(given, self.num_envs))
        if lambdas is not None:
            self.weights.assign("lambda", lambdas)
        if mus is not None:
            self.weights.assign("mu", mus)
        return self._observe()

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        return self.actions.masks(self._walk.here_B)

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode.

        Raises:
            ConfigError: not B whole numbers within the actions.
        """
        target_B, column_B, terminated_B = self._walk.targets(actions_B)
        paid_BO = self._walk.pay(column_B)
        self._spent_BO += paid_BO
        ended_K = np.flatnonzero(terminated_B)
        column_K = column_B[ended_K]
        vector_BV = np.zeros((self.num_envs, len(self.objectives)), np.float64)
        vector_BV[:, 1:] = -paid_BO
        vector_BV[ended_K, 0] = self._quality_NE1[self._walk.token_B[ended_K], column_K]
        reward_B = self.weights.reward(vector_BV)
        finals = self._end(ended_K, column_K)
        self._walk.advance(target_B)
        if self._autoreset:
            self._begin(ended_K)
        obs_BD = self._observe()
        if not self._autoreset:
            obs_BD[ended_K] = finals.obs_KD
        return StepBatch(obs_BD, reward_B, terminated_B, finals, vector_BV)

    def _allocate(self) -> None:
        self._spent_BO = np.zeros((self.num_envs, len(self.objectives) - 1), np.float64)

    def _begin(self, place_K: IndexArray) -> None:
        self._place(place_K, self.rng.integers(len(self._quality_NE1), size=len(place_K)))
        self.weights.draw(self.rng, place_K)

    def _place(self, place_K: IndexArray, token_K: IndexArray) -> None:
        self._spent_BO[place_K] = 0
        self._walk.begin(place_K, token_K)

    def _observe(self) -> FloatArray:
        return self._observe_at(np.arange(self.num_envs))

    def _observe_at(self, place_K: IndexArray) -> FloatArray:
        obs_KD = np.empty((len(place_K), self.num_columns), np.float32)
        self._walk.observe(obs_KD, place_K)
        obs_KD[:, self._walk.width :] = self.weights.log_BW[place_K]
        return obs_KD

    def _end(self, place_K: IndexArray, column_K: IndexArray) -> Finals:
        token_K = self._walk.token_B[place_K]
        info: dict[str, NDArray[Any]] = {
            "quality": self._quality_NE1[token_K, column_K].astype(np.float64),
            "cost": self._spent_BO[place_K, LATENCY],
            "exit_layer": self._layer_E1[column_K],
            "probes": self._walk.probes_B[place_K],
            "agree": self._agree_NE1[token_K, column_K].astype(np.float64),
            "token": token_K,
        }
        energy_K = self._spent_BO[place_K, ENERGY] if "energy" in self.objectives else None
        info = self._with_weights(info, place_K, energy_K)
        return Finals(place_K, self._observe_at(place_K), info)

    def _with_weights(
        self, info: dict[str, NDArray[Any]], place_K: IndexArray, energy_K: RewardArray | None
    ) -> dict[str, NDArray[Any]]:
        """The info columns of ended episodes, with their energy, if known, and their weights."""
        if energy_K is not None:
            info["energy"] = energy_K
        for w, name in enumerate(self.weights.names):
            info[name] = self.weights.value_BW[place_K, w]
        return info


def checked_tokens(tokens: ArrayLike, count: int) -> IndexArray:
    """Rows of the traces, if they are some.

    Raises:
        ConfigError: one is out of range.
    """
    values = np.asarray(tokens, np.int64)
    if ((values < 0) | (values >= count)).any():
        raise ConfigError("token", f"must be from 0 to {count - 1}")
    return values


def checked_costs(traces: TokenTraces, costs: CostTable, num_envs: int) -> CostTable:
    """What every core asks of its arguments; the costs under the probe that was recorded.

    Raises:
        ConfigError: no episode, or costs of another model or other probes.
        TraceError: an unknown schema, or a feature that is NaN or beyond the declared bounds.
    """
    if num_envs < 1:
        raise ConfigError("num_envs", f"{num_envs} is below 1")
    header, schema = traces.header, schema_of(traces.header)
    if traces.features_NEF.shape[2] != schema.width:
        raise TraceError(
            "features_NEF",
            f"have {traces.features_NEF.shape[2]} columns, {schema.name!r} has {schema.width}",
            "Record them again",
        )
    largest = max(traces.features_NEF.max(), -traces.features_NEF.min())
    if not largest <= FEATURE_LIMIT:
        raise TraceError(
            "features_NEF", f"reach {largest}, beyond ±{FEATURE_LIMIT:g}", "Record them again"
        )
    return costs_for(costs, header.model, header.layers, schema.name)
