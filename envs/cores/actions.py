"""Which actions an episode has, and where each leads.

Shape suffixes: B parallel episodes, A actions, E exits.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray
from offramp.envs.cores.batch import IndexArray

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
        asks_first: As given.

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
            actions_B: Checked actions.
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
