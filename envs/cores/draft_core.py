"""Many draft-and-verify episodes at once, in numpy: the one implementation behind every adapter.

Shape suffixes: B parallel episodes, K some of them, D observation columns, E exits, L layers,
A actions, V objectives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import MAX_PENDING, BoolArray, FloatArray
from offramp.controller.policies.drafts.draft_trust import chances_of
from offramp.envs.cores.batch import Finals, IndexArray, StepBatch
from offramp.envs.cores.draft_tables import (
    CandidateDrafts,
    DraftActions,
    DraftPrices,
    DraftTables,
    require_arguments,
    require_same_model,
)
from offramp.envs.cores.draft_view import COLUMNS, DraftView
from offramp.envs.cores.open_drafts import OpenDrafts
from offramp.envs.cores.walk import Actions
from offramp.envs.traces.tokens import TokenTraces

COUNTS = ("tokens", "cycles", "drafts", "accepted", "asked", "layer_calls", "copy_calls")
"""What is counted in an episode, beside its seconds."""


class Unweighed:
    """Nothing of the reward is weighed by what an episode observes."""

    names: tuple[str, ...] = ()


class DraftExitCore:
    """B parallel episodes of drafting and verifying along recorded tokens.

    ``DraftExitEnv`` documents observations, actions, reward and what is counted. Tokens to start
    at are drawn uniformly with replacement from one PCG64 generator, in order of place.

    Args:
        traces: Recorded tokens, each document's contiguous and in order. ``CandidateDrafts``
            make drafting headless.
        costs: Measured costs of the model that was recorded, with the probe that is asked.
        num_envs: Number B of parallel episodes.
        max_pending: Drafts that may be open before a token must run all layers.
        cycles: Cycles in an episode at most; None: to the end of the document.
        rate: ρ, tokens per full-depth token's time that a second must earn.
        autoreset: Start the next episode in the step that ends one.
        odds: Log-odds at which each exit's token is held to be right, [N, E]; None: those of its
            top-1 probability. Trust is a product of their chances.

    Raises:
        ConfigError: an argument is out of range, or the costs are of another model.
        TraceError: no document has two tokens, or the odds are of other traces.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        max_pending: int = MAX_PENDING,
        cycles: int | None = None,
        rate: float = 1.0,
        autoreset: bool = True,
        odds: FloatArray | None = None,
    ) -> None:
        require_arguments(num_envs, max_pending, cycles)
        require_same_model(traces, costs)
        self.num_envs = num_envs
        self.num_columns = COLUMNS
        self.objectives: tuple[str, ...] = ("tokens", "latency")
        self.weights = Unweighed()
        self.exits = len(traces.header.exits)
        self.layers = traces.header.layers
        self.max_pending = max_pending
        self.actions: Actions = DraftActions(self.exits)
        self.tables = DraftTables.of(traces, odds)
        self.prices = DraftPrices.of(
            costs, max_pending, traces.header.exits, headless=isinstance(traces, CandidateDrafts)
        )
        self.set_rate(rate)
        self.rng = np.random.default_rng()
        self.view = DraftView(num_envs, self.tables, max_pending)
        self._cycles = cycles
        self._autoreset = autoreset
        self._allocate()
        self.reset()

    def set_rate(self, rate: float) -> None:
        """Set ρ, the rate that rewards are counted against.

        Raises:
            ConfigError: not a finite number from 0 on.
        """
        if not 0 <= rate < np.inf:
            raise ConfigError("rate", f"{rate} is no finite number from 0 on")
        self.rate = rate

    def reset(
        self,
        seed: int | np.random.Generator | None = None,
        *,
        tokens: ArrayLike | None = None,
        **unknown: Any,
    ) -> FloatArray:
        """Start B new episodes and return their observations [B, D].

        Args:
            seed: New seed or generator; None goes on with the present one.
            tokens: Rows of the traces to start at, one or B; None draws them.

        Raises:
            ConfigError: a token is out of range or the last of its document, or something else
                is to be set.
        """
        if unknown:
            raise ConfigError("options", f"{min(unknown)!r} cannot be set here", "Use token")
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        everyone = np.arange(self.num_envs)
        if tokens is None:
            self._begin(everyone)
        else:
            self._begin_at(everyone, self.tables.checked_starts(tokens, self.num_envs))
        return self._observe(everyone)

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode that is not over.

        Raises:
            ConfigError: not B whole numbers from 0 to E.
        """
        obs_BD = self._observe(np.arange(self.num_envs))
        checked_B = self.actions.checked(actions_B, self.num_envs)
        target_B = self.actions.targets(self._here_B, checked_B)
        runs_B = ~self._ended_B
        leaves_B = runs_B & (self._here_B >= 0) & (target_B == self._here_B)
        deep_B = runs_B & (target_B == self.exits)
        before_B = self._counts["tokens"].copy()
        self._spent_B[:] = np.where(runs_B & (self._here_B < 0), self.prices.start_s, 0.0)
        self._leave(np.flatnonzero(leaves_B))
        self._go_on(np.flatnonzero(runs_B & ~(leaves_B | deep_B)), target_B)
        self._verify(np.flatnonzero(deep_B))
        while len(forced_K := self._forced()):
            self._verify(forced_K)
        self._seconds_B += self._spent_B
        tokens_B, fulls_B = self._counts["tokens"] - before_B, self._spent_B / self.prices.full_s
        return self._conclude(obs_BD, np.stack([tokens_B, -fulls_B], axis=-1))

    def observation(self) -> FloatArray:
        """Where all episodes stand, [B, D]."""
        return self._observe(np.arange(self.num_envs))

    def standing(self, place: int) -> tuple[int, int, int]:
        """An episode's newest token, its exit (−1 before the first layer), and cycles so far."""
        token = self._base_B[place] + self._pending_B[place]
        return int(token), int(self._here_B[place]), int(self._counts["cycles"][place])

    def action_masks(self) -> BoolArray:
        """Which actions are not jumps past the last exit, [B, A]."""
        return self.actions.masks(self._here_B)

    def _conclude(self, obs_BD: FloatArray, earned_BV: NDArray[np.float64]) -> StepBatch:
        terminated_B = self._ended_B.copy()
        ended_K = np.flatnonzero(terminated_B)
        finals = Finals(ended_K, obs_BD[ended_K], self._info(ended_K))
        if self._autoreset:
            self._begin(ended_K)
        reward_B = earned_BV[:, 0] + self.rate * earned_BV[:, 1]
        next_BD = self._observe(np.arange(self.num_envs))
        return StepBatch(next_BD, reward_B, terminated_B, finals, earned_BV)

    def _allocate(self) -> None:
        places = self.num_envs
        self._base_B = np.zeros(places, np.int64)  # the cycle's first token
        self._end_B = np.zeros(places, np.int64)  # after its document's last
        self._pending_B = np.zeros(places, np.int64)
        self._here_B = np.full(places, -1, np.int64)
        self._right_B = np.zeros(places, np.int64)  # open drafts up to the first wrong one
        self._intact_B = np.ones(places, np.bool_)  # whether that is all of them
        self._open = OpenDrafts(places, self.layers)
        self._ended_B = np.zeros(places, np.bool_)
        self._spent_B = np.zeros(places, np.float64)
        self._seconds_B = np.zeros(places, np.float64)
        self._counts = {name: np.zeros(places, np.int64) for name in COUNTS}

    def _begin(self, place_K: IndexArray) -> None:
        drawn_K = self.rng.integers(len(self.tables.startable_M), size=len(place_K))
        self._begin_at(place_K, self.tables.startable_M[drawn_K])

    def _begin_at(self, place_K: IndexArray, token_K: IndexArray) -> None:
        self._base_B[place_K] = token_K
        self._end_B[place_K] = self.tables.end_N[token_K]
        self._seconds_B[place_K] = 0
        self._ended_B[place_K] = False
        for count_B in self._counts.values():
            count_B[place_K] = 0
        self._open_cycle(place_K)
        self.view.begin(place_K)

    def _open_cycle(self, place_K: IndexArray) -> None:
        self._here_B[place_K] = -1
        self._pending_B[place_K] = 0
        self._right_B[place_K] = 0
        self._intact_B[place_K] = True
        self._open.begin(place_K)
        self.view.begin_token(place_K)

    def _observe(self, place_K: IndexArray) -> FloatArray:
        token_K = self._base_B[place_K] + self._pending_B[place_K]
        return self.view.observe(place_K, token_K, self._here_B[place_K], self._pending_B[place_K])

    def _go_on(self, place_K: IndexArray, target_B: IndexArray) -> None:
        """Run to the next exit and be asked there."""
        here_K, target_K = self._here_B[place_K], target_B[place_K]
        depth_K, on_copy_D = self.tables.depth_D[target_K + 1], self.tables.on_copy_D
        on_copy_K = on_copy_D[target_K + 1]
        self._draft_on_copy(place_K[on_copy_K], depth_K[on_copy_K])
        self._run(place_K[~on_copy_K], depth_K[~on_copy_K])
        ask_K = np.where(on_copy_K, self.prices.copy_ask_s, self.prices.ask_s)
        # A probe is prepared for the copy, and anew for the model's own layers.
        first_K = (here_K < 0) | (on_copy_D[here_K + 1] & ~on_copy_K)
        self._spent_B[place_K] += ask_K + self.prices.build_s * first_K
        self._counts["asked"][place_K] += 1
        self._here_B[place_K] = target_K
        self.view.probed(
            place_K, self._base_B[place_K] + self._pending_B[place_K], here_K, target_K
        )

    def _leave(self, place_K: IndexArray) -> None:
        """Draft a token from this exit, and begin the token after it."""
        here_K = self._here_B[place_K]
        token_K = self._base_B[place_K] + self._pending_B[place_K]
        right_K = self.tables.right_NE[token_K, here_K]
        self._intact_B[place_K] &= right_K
        self._right_B[place_K] += self._intact_B[place_K]
        self._pending_B[place_K] += 1
        depth_K = self.tables.depth_D[here_K + 1]
        filled_K = self._open.left(place_K, depth_K, self.tables.own_D[here_K + 1])
        self._spent_B[place_K] += self.prices.step_W[0] + self.prices.fill_s * filled_K
        self._counts["drafts"][place_K] += 1
        self._here_B[place_K] = -1
        self.view.drafted(place_K, depth_K, chances_of(self.tables.odds_NE[token_K, here_K]))

    def _verify(self, place_K: IndexArray) -> None:
        """Run to the end, with all open drafts; what full depth says of them is certain."""
        pending_K = self._pending_B[place_K]
        self._run(place_K, self.layers)
        self._spent_B[place_K] += self.prices.head_W[pending_K] + self.prices.step_W[pending_K]
        right_K = self._right_B[place_K]
        self._counts["tokens"][place_K] += right_K + 1
        self._counts["cycles"][place_K] += 1
        self._counts["accepted"][place_K] += right_K
        self.view.verified(place_K, right_K, pending_K)
        self._base_B[place_K] += right_K + 1
        self._ended_B[place_K] = self._base_B[place_K] == self._end_B[place_K]
        if self._cycles is not None:
            self._ended_B[place_K] |= self._counts["cycles"][place_K] >= self._cycles
        self._open_cycle(place_K)

    def _draft_on_copy(self, place_K: IndexArray, until_K: IndexArray) -> None:
        """Charge the copy's layers from where the newest token stands, and entries it lacks."""
        layers_K = until_K - self.tables.depth_D[self._here_B[place_K] + 1]
        filled_K = self._open.filled(place_K)
        self._counts["copy_calls"][place_K] += layers_K
        self._spent_B[place_K] += (
            layers_K * self.prices.copy_layer_s + filled_K * self.prices.fill_s
        )

    def _run(self, place_K: IndexArray, until: IndexArray | int) -> None:
        """Charge the model's own layers from where the newest token stands up to a depth."""
        start_K = self.tables.own_D[self._here_B[place_K] + 1]
        runs_KL, joined_KL = self._open.launched(place_K, start_K, until)
        calls_KL = np.where(runs_KL, self.tables.calls_L, 0)
        self._spent_B[place_K] += (calls_KL * self.prices.layer_W[joined_KL]).sum(1)
        self._counts["layer_calls"][place_K] += (calls_KL * (joined_KL + 1)).sum(1)

    def _forced(self) -> IndexArray:
        """Episodes whose new token must run all layers, so that nobody is asked."""
        new_B = (self._here_B < 0) & ~self._ended_B
        last_B = self._base_B + self._pending_B == self._end_B - 1
        must_B = (self._pending_B == self.max_pending) | last_B
        return np.flatnonzero(new_B & must_B)

    def _info(self, place_K: IndexArray) -> dict[str, NDArray[Any]]:
        info: dict[str, NDArray[Any]] = {
            name: count_B[place_K] for name, count_B in self._counts.items()
        }
        info["seconds"] = self._seconds_B[place_K]
        return info
