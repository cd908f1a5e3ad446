"""Which rows run next, and through which layers.

Rows stand at depths: 0 before a new token, or where a token that stays waits for company: at a
*hold*, or, together, where no policy asks any more. The scheduler knows nothing of models, only of
ids and depths.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError

Id = TypeVar("Id", bound=Hashable)
Priced = TypeVar("Priced", contravariant=True)

Ending = Literal["each", "wait", "all"]
"""What becomes of rows that no policy is asked about any more, because they go to the end.

each: they run on, each as its policy says.
wait: where others have left, they stop and wait for those; else they run on, and rows that wait at
their depth or deeper run along.
all: all that wait run along, and in ``verify`` nobody is asked: each row's drafts are judged.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How rows share launches.

    Without holds all rows advance in lock-step, one token per launch. With holds rows form
    cohorts: those that leave early take their next token at once, while those that stay wait at
    a hold until enough wait there or one has waited long enough.

    Together, verification is synchronous: a row that its policy sends to the end waits, wherever
    it is, while others draft; then one launch takes all of them through the deep layers, with every
    pending draft of every row. No token depends on it: in ``verify`` they are full depth's, and in
    the other modes no row's depth is changed, only when it goes there.

    Priced, it is chosen launch by launch, from measured costs and from how many drafts turn out
    right: drafting and verifying together, for how many waiting rows the others stop drafting, or,
    for rows in ``verify``, no exits at all. Batches without rows that draft run in lock-step.

    Attributes:
        holds: Depths at which stayers wait, ascending; () is lock-step.
        rows: So many waiting rows start the deeper stage; not looked at if priced.
        patience: A row waits for at most so many launches of others.
        together: Rows wait where they are bound for the end, not at holds.
        costs: What launches cost here; None: the schedule is as it is set. Implies ``together``.

    Raises:
        ConfigError: holds out of order or beside ``together``, or a number below its bound.
    """

    holds: tuple[int, ...] = ()
    rows: int = 4
    patience: int = 4
    together: bool = False
    costs: CostTable | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("holds", self.holds), ("rows", (self.rows, self.patience))):
            if not all(isinstance(number, int) for number in numbers):
                raise ConfigError(name, f"{numbers} are not all integers", "Use whole numbers")
        if list(self.holds) != sorted(set(self.holds)) or any(hold < 1 for hold in self.holds):
            raise ConfigError("holds", f"{self.holds} do not ascend from 1 on", "Sort them")
        if (self.together or self.costs) and self.holds:
            problem = f"{self.holds} are set where rows go deep together"
            raise ConfigError("holds", problem, "Drop them, or together and costs")
        if self.rows < 1:
            raise ConfigError("rows", f"{self.rows} is below 1", "Use 1 or more")
        if self.patience < 0:
            raise ConfigError("patience", f"{self.patience} is below 0", "Use 0 or more")


LOCKSTEP = Schedule()
"""All rows take a token per launch."""


class Price(Protocol[Priced]):
    """What decides for a priced schedule."""

    def __call__(self, begin: Sequence[Priced], waiting: Sequence[Priced], /) -> bool:
        """Whether all rows go deep now: those that stand at 0, and those that wait."""
        ...

    def took(self, seconds: float, /) -> None:
        """Learn how long the launch took that was last decided."""
        ...


@dataclass(frozen=True, slots=True)
class Launch(Generic[Id]):
    """Rows to run from one depth to the next.

    Attributes:
        first: Depth at which they stand.
        last: Depth at which they wait again, or the number of layers.
        members: Rows that run.
        ending: What becomes of those that are bound for the end.
        later: Rows that wait deeper, and join there if the launch comes by.
    """

    first: int
    last: int
    members: tuple[Id, ...]
    ending: Ending = "each"
    later: tuple[Id, ...] = ()


class Scheduler(Generic[Id]):
    """Decides the next launch.

    Args:
        schedule: How rows share launches.
        layers: Number of layers of the model.
        price: Decides for a priced schedule.

    Raises:
        ConfigError: a hold at or beyond the last layer.
    """

    def __init__(self, schedule: Schedule, layers: int, price: Price[Id] | None = None) -> None:
        if any(hold >= layers for hold in schedule.holds):
            raise ConfigError(
                "holds",
                f"{schedule.holds} are not below the {layers} layers",
                "Hold before the last layer",
            )
        self.schedule = schedule
        self._price = price
        self._stages = (0, *schedule.holds, layers)
        self._clock = 0
        self._since: dict[Id, int] = {}

    def next(self, standing: Mapping[int, Sequence[Id]]) -> Launch[Id] | None:
        """The next launch; None if no row stands anywhere.

        Args:
            standing: Rows by the depth they stand at: 0, or where they wait.
        """
        self._observe(standing)
        if self.schedule.together or self._price is not None:
            return self._next_together(standing)
        stage = self._stage(standing)
        if stage is None:
            return None
        self._clock += 1
        first, last = self._stages[stage : stage + 2]
        members = tuple(standing[first])
        for member in members:
            self._since.pop(member, None)
        return Launch(first, last, members)

    def took(self, seconds: float) -> None:
        """Learn how long the last launch took."""
        if self._price is not None:
            self._price.took(seconds)

    def _next_together(self, standing: Mapping[int, Sequence[Id]]) -> Launch[Id] | None:
        """Let rows draft while few wait; then all go deep."""
        begin = tuple(standing.get(0, ()))
        waiting = tuple(row for depth, rows in standing.items() if depth > 0 for row in rows)
        if not begin and not waiting:
            return None
        is_over = bool(waiting) and self._longest_wait(waiting) >= self.schedule.patience
        if self._price is not None:
            deep = not begin or is_over or self._price(begin, waiting)
        else:
            deep = not begin or is_over or len(waiting) >= self.schedule.rows
        self._clock += 1
        if not deep:
            return Launch(0, self._stages[-1], begin, "wait", waiting)
        first = 0 if begin else min(depth for depth, rows in standing.items() if rows)
        return Launch(first, self._stages[-1], begin, "all", waiting)

    def _observe(self, standing: Mapping[int, Sequence[Id]]) -> None:
        waiting = {member for depth, rows in standing.items() if depth > 0 for member in rows}
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
