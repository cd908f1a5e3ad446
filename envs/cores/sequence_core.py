"""Many sequences at once, in numpy: tokens in order, with the debt that exits leave behind.

Shape suffixes: B parallel episodes, K of them, D = F + C + W observation columns (features,
outlook, weights), E1 = exits and full depth, O objectives that cost, V = 1 + O objectives of a
reward vector.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import MAX_PENDING, OUTLOOK_V1, FloatArray
from offramp.envs.charges.pending import PendingTokens, added_by_pending
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.charges.tradeoffs import DEFAULT_LAMBDA_RANGE, Range
from offramp.envs.cores.batch import Finals, IndexArray, RewardArray, StepBatch
from offramp.envs.cores.history import ACTIVE, PENDING, History
from offramp.envs.cores.token_core import TokenExitCore, checked_costs
from offramp.envs.cores.walk import ActionKind, Actions
from offramp.envs.traces.sequences import Sequences
from offramp.envs.traces.tokens import Quality, TokenTraces

DEBT_LOSS, DEBT_POWER = 0.215, 0.5
"""Under projected keys and values a token loses loss · debt^power of its quality.

Fitted on-policy to the reference model (benchmarks/debt.py; docs/environments.md has the fit).
"""

DebtMode = Literal["project", "defer"]
"""What becomes of skipped layers: projected at once, or run later by the token that goes past."""


class SequenceExitCore(TokenExitCore):
    """B parallel episodes, each a run of recorded tokens of one document.

    ``SequenceExitEnv`` documents observations, actions and reward. Runs are drawn uniformly from
    those that fit, then the number of rows, then the weights, from one PCG64 generator.

    Args:
        traces: Recorded tokens of two documents or more.
        costs: Measured costs of the model that was recorded.
        num_envs: Number B of parallel episodes.
        horizon: Tokens of an episode at most.
        kv_mode: ``project`` or ``defer``.
        debt_loss, debt_power: How debt harms in ``project``: a token loses loss · debt^power of
            its quality.
        max_pending: Tokens that may be pending in ``defer``.
        pending_share: What a pending token adds to a layer in ``defer``, as a share of a layer;
            None reads it off the cost table's spans.
        rows: Numbers of rows in the batch to draw from.
        lambda_range, quality, autoreset, actions, jumps, asks_first, ends, energy_range: Mean
            what they do in ``TokenExitCore``.

    Attributes:
        actions: What can be done.
        num_columns: Number D of observation columns.
        objectives: Names of the V entries of a reward vector.

    Raises:
        ConfigError: an argument is out of range, or the costs are of another model.
        TraceError: the traces are unusable (see ``Sequences`` and ``TokenExitCore``).
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        horizon: int = 64,
        kv_mode: DebtMode = "project",
        debt_loss: float = DEBT_LOSS,
        debt_power: float = DEBT_POWER,
        max_pending: int = MAX_PENDING,
        pending_share: float | None = None,
        rows: tuple[int, ...] = (1,),
        lambda_range: Range = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
        autoreset: bool = True,
        actions: ActionKind = "jump",
        jumps: int | None = None,
        asks_first: bool = False,
        ends: bool = False,
        energy_range: Range | None = None,
    ) -> None:
        costs = checked_costs(traces, costs, num_envs)
        _check_mode(kv_mode, (debt_loss, debt_power), max_pending, rows)
        header = traces.header
        is_deferred = kv_mode == "defer"
        token_costs = [
            TokenCosts.of(
                costs, header.exits, each, fills=not is_deferred, adapters=header.adapters
            )
            for each in rows
        ]
        self._set_up(
            traces,
            token_costs,
            Actions(actions, len(header.exits), jumps, asks_first, ends),
            num_envs,
            (lambda_range, energy_range),
            quality,
            autoreset,
        )
        self._pending: PendingTokens | None = None
        if is_deferred:
            added_MO = added_by_pending(costs, max_pending, pending_share)
            self._pending = PendingTokens(
                header.exits, header.layers, max_pending, added_MO, num_envs
            )
        self.num_columns = self._walk.width + OUTLOOK_V1.width + len(self.weights.names)
        self._debt_loss, self._debt_power = 0.0 if is_deferred else debt_loss, debt_power
        self._max_pending = max_pending
        self._active_C = np.array(rows, np.float64) / max(rows)
        self._sequences = Sequences(traces, horizon)
        self._full, self._layers = len(header.exits), header.layers
        self._history = History(num_envs, self._layer_E1.astype(np.float64))
        self.reset()

    def _allocate(self) -> None:
        self._total_BV = np.zeros((self.num_envs, len(self.objectives)), np.float64)
        # Sums over an episode's tokens: layers, agreement, probes, tokens never asked.
        self._sums_B4 = np.zeros((self.num_envs, 4), np.float64)
        self._start_B = np.zeros(self.num_envs, np.int64)

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode.

        Raises:
            ConfigError: not B whole numbers within the actions.
        """
        target_B, column_B, is_done_B = self._walk.targets(actions_B)
        paid_BO = self._walk.pay(column_B)
        if self._pending is not None:
            paid_BO += self._walk.way(self._pending.way_BPO, np.arange(self.num_envs), column_B)
        vector_BV = np.zeros((self.num_envs, len(self.objectives)), np.float64)
        vector_BV[:, 1:] = -paid_BO
        done_K = np.flatnonzero(is_done_B)
        vector_BV[done_K, 0] = self._settle(done_K, column_B[done_K])
        self._walk.advance(target_B)
        self._next(done_K)
        self._run_unasked(done_K, vector_BV)
        self._total_BV += vector_BV
        ended_K = done_K[self._history.left_B[done_K] == 0]
        finals = self._finish(ended_K)
        terminated_B = np.zeros(self.num_envs, np.bool_)
        terminated_B[ended_K] = True
        reward_B = self.weights.reward(vector_BV)
        if self._autoreset:
            self._begin(ended_K)
        obs_BD = self._observe()
        if not self._autoreset:
            obs_BD[ended_K] = finals.obs_KD
        return StepBatch(obs_BD, reward_B, terminated_B, finals, vector_BV)

    def _settle(self, place_K: IndexArray, column_K: IndexArray) -> RewardArray:
        """Tokens that came out at a column: note them, and return their qualities."""
        token_K = self._walk.token_B[place_K]
        debt_K = self._history.debt_BE1[place_K, column_K]
        kept_K = 1 - self._debt_loss * debt_K**self._debt_power
        agree_K = kept_K * self._agree_NE1[token_K, column_K]
        layer_K = self._layer_E1[column_K]
        sums_B4 = self._sums_B4
        sums_B4[place_K, 0] += layer_K
        sums_B4[place_K, 1] += agree_K
        sums_B4[place_K, 2] += self._walk.probes_B[place_K]
        self._history.add(place_K, layer_K / self._layers)
        if self._pending is not None:
            self._pending.settle(place_K, column_K)
        quality_K: RewardArray = kept_K * self._quality_NE1[token_K, column_K]
        return quality_K

    def _run_unasked(self, done_K: IndexArray, vector_BV: RewardArray) -> None:
        """Rows that can leave no more pending: their next token runs all layers, unasked."""
        if self._pending is None:
            return
        forced_K = done_K[self._pending.are_full(done_K) & (self._history.left_B[done_K] > 0)]
        vector_BV[forced_K, 1:] -= (
            self._walk.unasked(forced_K) + self._pending.way_BPO[forced_K, -1]
        )
        vector_BV[forced_K, 0] += self._settle(forced_K, np.full(len(forced_K), self._full))
        self._sums_B4[forced_K, 3] += 1
        self._next(forced_K)

    def _next(self, place_K: IndexArray) -> None:
        """Go on to the next token, where there is one."""
        going_K = place_K[self._history.left_B[place_K] > 0]
        self._walk.begin(going_K, self._walk.token_B[going_K] + 1)

    def _begin(self, place_K: IndexArray) -> None:
        drawn_K = self.rng.integers(len(self._sequences.starts), size=len(place_K))
        self._walk.crowd_B[place_K] = self.rng.integers(len(self._active_C), size=len(place_K))
        self.weights.draw(self.rng, place_K)
        self._place(place_K, self._sequences.starts[drawn_K])

    def _place(self, place_K: IndexArray, token_K: IndexArray) -> None:
        self._start_B[place_K] = token_K
        self._total_BV[place_K] = 0
        self._sums_B4[place_K] = 0
        self._walk.begin(place_K, token_K)
        self._history.begin(place_K, self._sequences.length_N[token_K])
        self._history.outlook_BC[place_K, ACTIVE] = self._active_C[self._walk.crowd_B[place_K]]
        if self._pending is not None:
            self._pending.begin(place_K)

    def _observe(self) -> FloatArray:
        obs_BD = np.empty((self.num_envs, self.num_columns), np.float32)
        self._walk.observe(obs_BD, np.arange(self.num_envs))
        outlook_BC = self._history.outlook_BC
        if self._pending is not None:
            outlook_BC[:, PENDING] = self._pending.count_B / self._max_pending
        width, weights = self._walk.width, len(self.weights.names)
        obs_BD[:, width:-weights] = outlook_BC
        obs_BD[:, -weights:] = self.weights.log_BW
        self._seen_BD = obs_BD.copy()  # what is returned is the caller's
        return obs_BD

    def _finish(self, place_K: IndexArray) -> Finals:
        tokens_K = self._history.step_B[place_K]
        means_KV = self._total_BV[place_K] / tokens_K[:, None]
        sums_K4 = self._sums_B4[place_K]
        info: dict[str, NDArray[Any]] = {
            "quality": means_KV[:, 0],
            "cost": -means_KV[:, 1],
            "exit_layer": sums_K4[:, 0] / tokens_K,
            "probes": sums_K4[:, 2] / tokens_K,
            "agree": sums_K4[:, 1] / tokens_K,
            "unasked": sums_K4[:, 3].astype(np.int64),
            "tokens": tokens_K,
            "token": self._start_B[place_K],
        }
        energy_K = -means_KV[:, 2] if "energy" in self.objectives else None
        return Finals(place_K, self._seen_BD[place_K], self._with_weights(info, place_K, energy_K))


def _check_mode(
    kv_mode: str, debt: tuple[float, float], max_pending: int, rows: tuple[int, ...]
) -> None:
    if kv_mode not in get_args(DebtMode):
        raise ConfigError("kv_mode", f"{kv_mode!r} is unknown here", "Use project or defer")
    if not 0 <= debt[0] <= 1:
        raise ConfigError("debt_loss", f"{debt[0]} is not from 0 to 1", "Give a share of quality")
    if not 0 < debt[1] < math.inf:
        raise ConfigError("debt_power", f"{debt[1]} is no positive power", "Use 1 for a line")
    if max_pending < 1:
        raise ConfigError("max_pending", f"{max_pending} is below 1")
    if not rows or min(rows) < 1:
        raise ConfigError("rows", f"{rows} are no numbers of rows from 1 on", "Use (1,) for one")
