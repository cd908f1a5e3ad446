"""Which rows run next, and through which layers.

Rows stand at depths: 0 before a new token, or at a *hold*, a depth where a token that stays waits
for company. The scheduler knows nothing of models, only of ids and depths.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from offramp.controller.errors import ConfigError

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How rows share launches.

    Without holds all rows advance in lock-step, one token per launch. With holds rows form
    cohorts: those that leave early take their next token at once, while those that stay wait at
    a hold until enough wait there or one has waited long enough.

    Attributes:
        holds: Depths at which stayers wait, ascending; () is lock-step.
        rows: So many waiting rows start the deeper stage.
        patience: A row waits for at most so many launches of others.

    Raises:
        ConfigError: holds out of order, or a number below its bound.
    """

    holds: tuple[int, ...] = ()
    rows: int = 4
    patience: int = 4

    def __post_init__(self) -> None:
        for name, numbers in (("holds", self.holds), ("rows", (self.rows, self.patience))):
            if not all(isinstance(number, int) for number in numbers):
                raise ConfigError(name, f"{numbers} are not all integers", "Use whole numbers")
        if list(self.holds) != sorted(set(self.holds)) or any(hold < 1 for hold in self.holds):
            raise ConfigError("holds", f"{self.holds} do not ascend from 1 on", "Sort them")
        if self.rows < 1:
            raise ConfigError("rows", f"{self.rows} is below 1", "Use 1 or more")
        if self.patience < 0:
            raise ConfigError("patience", f"{self.patience} is below 0", "Use 0 or more")


LOCKSTEP = Schedule()
"""All rows together."""


@dataclass(frozen=True, slots=True)
class Launch(Generic[Id]):
    """Rows to run from one depth to the next.

    Attributes:
        first: Depth at which they stand.
        last: Depth at which they wait again, or the number of layers.
        members: Rows that run.
    """

    first: int
    last: int
    members: tuple[Id, ...]


class Scheduler(Generic[Id]):
    """Decides the next launch.

    Args:
        schedule: How rows share launches.
        layers: Number of layers of the model.

    Raises:
        ConfigError: a hold at or beyond the last layer.
    """

    def __init__(self, schedule: Schedule, layers: int) -> None:
        if any(hold >= layers for hold in schedule.holds):
            raise ConfigError(
                "holds",
                f"{schedule.holds} are not below the {layers} layers",
                "Hold before the last layer",
            )
        self.schedule = schedule
        self._stages = (0, *schedule.holds, layers)
        self._clock = 0
        self._since: dict[Id, int] = {}

    def next(self, standing: Mapping[int, Sequence[Id]]) -> Launch[Id] | None:
        """The next launch; None if no row stands anywhere.

        Args:
            standing: Rows by the depth they stand at (0 or a hold).
        """
        self._observe(standing)
        stage = self._stage(standing)
        if stage is None:
            return None
        self._clock += 1
        first, last = self._stages[stage : stage + 2]
        members = tuple(standing[first])
        for member in members:
            self._since.pop(member, None)
        return Launch(first, last, members)

    def _observe(self, standing: Mapping[int, Sequence[Id]]) -> None:
        waiting = {member for hold in self.schedule.holds for member in standing.get(hold, ())}
        # Made anew each time, so that rows that were cancelled meanwhile are forgotten.
        self._since = {member: self._since.get(member, self._clock) for member in waiting}

    def _stage(self, standing: Mapping[int, Sequence[Id]]) -> int | None:
        """The deepest stage that is due; else the shallowest that has rows."""
        occupied = [i for i, depth in enumerate(self._stages[:-1]) if standing.get(depth)]
        due = [i for i in occupied if i > 0 and self._is_due(standing[self._stages[i]])]
        # Deep stages first: their rows hold slots, and the longer they wait the later they answer.
        if due:
            return max(due, key=lambda i: (self._longest_wait(standing[self._stages[i]]), i))
        return occupied[0] if occupied else None

    def _is_due(self, members: Sequence[Id]) -> bool:
        enough = len(members) >= self.schedule.rows
        return enough or self._longest_wait(members) >= self.schedule.patience

    def _longest_wait(self, members: Sequence[Id]) -> int:
        return self._clock - min(self._since[member] for member in members)
