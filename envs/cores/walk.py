"""Many tokens on their way through the exits: where each stands, what it sees, what it pays.

Shape suffixes: B parallel episodes, K of them, N tokens, E exits, F features, R = N · E rows of
features, O objectives that cost, P = E + 2 places, C crowds (numbers of rows in the batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.cores.batch import IndexArray, RewardArray
from offramp.envs.traces.pairs import PairFeatures
from offramp.envs.traces.tokens import TokenTraces

ActionKind = Literal["gate", "jump"]

GO_ON, LEAVE = 0, 1
"""The two actions of a gate. Of jumps, 0 leaves and j goes to the j-th exit from here."""


class Actions:
    """What can be done at an exit.

    Args:
        kind: ``gate``: go on to the next exit or leave. ``jump``: leave, or choose what to probe
            next.
        exits: Number E of recorded exits.
        jumps: Longest jump J, in exits; None allows all: E, or E + 1 if there is a first decision.
            Only of ``jump``.
        asks_first: Whether the first decision comes before the first layer: which exit to probe
            first. Only of ``jump``.
        ends: Whether there is one more action, the last: full depth from wherever it stands,
            unprobed. Only of ``jump``.

    Attributes:
        count: Number of actions.
        is_jump: Whether the kind is ``jump``.
        asks_first: Whether the first decision comes before the first layer.

    Raises:
        ConfigError: an unknown kind, options that do not go with it, or fewer exits than the
            jumps need.
    """

    def __init__(
        self,
        kind: ActionKind,
        exits: int,
        jumps: int | None = None,
        asks_first: bool = False,
        ends: bool = False,
    ) -> None:
        if kind not in get_args(ActionKind):
            raise ConfigError("actions", f"{kind!r} is unknown", "Use gate or jump")
        options = {"jumps": jumps is not None, "asks_first": asks_first, "ends": ends}
        if kind == "gate" and any(options.values()):
            name = next(name for name, given in options.items() if given)
            raise ConfigError(name, "goes with jumps only", 'Use actions="jump", or leave it out')
        most = exits + asks_first
        jumps = most if jumps is None else jumps
        if not 1 <= jumps <= most:
            raise ConfigError(
                "jumps",
                f"{jumps} is not from 1 to {most}: {exits} exits were recorded",
                "Allow shorter jumps, or record more exits",
            )
        self.is_jump = kind == "jump"
        self.asks_first = asks_first
        self.count = 1 + jumps + ends if self.is_jump else 2
        self._exits = exits
        # How far each action leads: the last one of ``ends`` past any exit.
        self._ahead_A = np.arange(self.count)
        if ends:
            self._ahead_A[-1] = exits + 1

    def targets(self, here_B: IndexArray, actions_B: NDArray[Any]) -> IndexArray:
        """Where each action leads: ``here`` leaves, a higher index is probed next, E is full depth.

        A jump past the last exit is full depth, unprobed, however far past. Before the first
        layer nobody can leave: that action leads to the first exit.

        Args:
            here_B: Exits where the episodes stand, −1 before the first layer.
            actions_B: Actions that ``checked`` let through.
        """
        if not self.is_jump:
            next_B: IndexArray = here_B + (LEAVE - actions_B)
            return next_B
        ahead_B = np.maximum(self._ahead_A[actions_B], here_B < 0)
        target_B: IndexArray = np.minimum(here_B + ahead_B, self._exits)
        return target_B

    def masks(self, here_B: IndexArray) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]; each step has one."""
        if not self.is_jump:
            return np.ones((len(here_B), 2), np.bool_)
        reach_BA = np.minimum(here_B[:, None] + self._ahead_A, self._exits)
        masks_BA = np.ones(reach_BA.shape, np.bool_)
        masks_BA[:, 1:] = reach_BA[:, 1:] > reach_BA[:, :-1]
        masks_BA[:, 0] = here_B >= 0
        return masks_BA

    def checked(self, actions_B: NDArray[Any], rows: int) -> NDArray[Any]:
        """The actions, if they are B whole numbers in range.

        Raises:
            ConfigError: they are not.
        """
        actions = np.asarray(actions_B)
        if actions.dtype.kind not in "iu" or actions.shape != (rows,):
            raise ConfigError(
                "actions",
                f"have shape {actions.shape} and type {actions.dtype}",
                f"Give {rows} whole numbers",
            )
        if actions.size and (actions.min() < 0 or actions.max() >= self.count):
            wrong = actions[(actions < 0) | (actions >= self.count)][0]
            raise ConfigError("actions", f"hold {wrong}", self.meaning)
        return actions

    @property
    def meaning(self) -> str:
        """What the actions do, in a sentence."""
        if not self.is_jump:
            return "Use 0 to go on and 1 to leave"
        return f"Use 0 to leave and 1 to {self.count - 1} to jump ahead"


class Walk:
    """B tokens, each at an exit or before the first layer.

    Args:
        traces: Recorded tokens that are walked through.
        token_costs: What the way costs, one per crowd.
        actions: What can be done.
        num_envs: Number B of tokens.

    Attributes:
        token_B: Which recorded token.
        crowd_B: Under which token_costs.
        here_B: Exit where it stands, −1 before the first layer.
        probes_B: Probes made of it.
    """

    def __init__(
        self,
        traces: TokenTraces,
        token_costs: Sequence[TokenCosts],
        actions: Actions,
        num_envs: int,
    ) -> None:
        _, self._exits, self.width = traces.features_NEF.shape
        self.actions = actions
        self._features_RF = traces.features_NEF.reshape(-1, self.width)
        self._pairs = PairFeatures(traces) if actions.is_jump else None
        self._first = -1 if actions.asks_first else 0
        self._leave_CPO = np.stack([each.leave_OP.T for each in token_costs])
        self._policy_CO = np.stack([each.policy_O for each in token_costs])
        self._probed_CO = np.stack([each.probe_O + each.policy_O for each in token_costs])
        self._build_CO = np.stack([each.build_O for each in token_costs])
        self.token_B = np.zeros(num_envs, np.int64)
        self.crowd_B = np.zeros(num_envs, np.int64)
        self.here_B = np.zeros(num_envs, np.int64)
        self.probes_B = np.zeros(num_envs, np.int64)
        self._before_B = np.zeros(num_envs, np.int64)  # what was probed before, −1 for nothing
        self._run_B = np.zeros(num_envs, np.int64)

    def begin(self, place_K: IndexArray, token_K: IndexArray) -> None:
        """Stand at the start of new tokens."""
        self.token_B[place_K] = token_K
        self.here_B[place_K] = self._first
        self.probes_B[place_K] = 0
        self._before_B[place_K] = -1
        self._run_B[place_K] = 0

    def targets(self, actions_B: NDArray[Any]) -> tuple[IndexArray, IndexArray, BoolArray]:
        """Where checked actions lead, the column it is paid up to, and which tokens end.

        Raises:
            ConfigError: not B whole numbers within the actions.
        """
        actions_B = self.actions.checked(actions_B, len(self.here_B))
        target_B = self.actions.targets(self.here_B, actions_B)
        is_full_B = target_B == self._exits
        column_B = np.where(is_full_B, target_B, self.here_B)
        return target_B, column_B, is_full_B | (target_B == self.here_B)

    def pay(self, column_B: IndexArray) -> RewardArray:
        """For the way since the last decision, the probe and this one, up to a column, [B, O]."""
        is_probed_B = self.here_B >= 0
        paid_BO = self.way(self._leave_CPO, self.crowd_B, column_B)
        paid_BO += np.where(
            is_probed_B[:, None], self._probed_CO[self.crowd_B], self._policy_CO[self.crowd_B]
        )
        is_first_B = is_probed_B & (self.probes_B == 0)
        paid_BO[is_first_B] += self._build_CO[self.crowd_B[is_first_B]]
        self.probes_B += is_probed_B
        return paid_BO

    def way(self, sums_GPO: RewardArray, group_B: IndexArray, column_B: IndexArray) -> RewardArray:
        """Sums up to a column less those up to the last decision, [B, O]."""
        sums_BO: RewardArray = sums_GPO[group_B, column_B + 1]
        return sums_BO - sums_GPO[group_B, self._before_B + 1]

    def unasked(self, place_K: IndexArray) -> RewardArray:
        """What a whole token costs that is never asked, [K, O]."""
        cost_KO: RewardArray = self._leave_CPO[self.crowd_B[place_K], -1]
        return cost_KO

    def advance(self, target_B: IndexArray) -> None:
        """Go where the actions lead; tokens that end must begin anew."""
        self._before_B = self.here_B
        self.here_B = np.minimum(target_B, self._exits - 1)
        if self._pairs is not None:
            self._run_B += 1
            self._run_B *= self._pairs.agrees_NPE[self.token_B, self._before_B + 1, self.here_B]

    def observe(self, obs_KD: FloatArray, place_K: IndexArray) -> None:
        """Write the features of some tokens into the first F columns."""
        token_K, here_K = self.token_B[place_K], self.here_B[place_K]
        obs_KD[:, : self.width] = self._features_RF[token_K * self._exits + here_K]
        if self._pairs is None:
            return
        pairs, before_K = self._pairs, self._before_B[place_K]
        obs_KD[:, pairs.columns] = pairs.values_NPEQ[token_K, before_K + 1, here_K]
        if pairs.run_column is not None:
            obs_KD[:, pairs.run_column] = self._run_B[place_K] / self._exits
        obs_KD[here_K < 0, : self.width] = 0
