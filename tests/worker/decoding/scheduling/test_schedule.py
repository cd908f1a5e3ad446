"""Which rows launch, from where to where: simulated rows, no model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.controller.errors import ConfigError
from offramp.worker.decoding.schedule import LOCKSTEP, Launch, Schedule, Scheduler

LAYERS = 8


@dataclass
class Simulation:
    """Rows that stand at depths, stay or leave at random, and end after some tokens."""

    schedule: Schedule
    seed: int
    stay: float
    depth: dict[int, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    waited: dict[int, int] = field(default_factory=dict)
    longest: int = 0
    launches: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.scheduler: Scheduler[int] = Scheduler(self.schedule, LAYERS)

    def admit(self, row: int, tokens: int) -> None:
        self.depth[row], self.left[row] = 0, tokens

    def standing(self) -> dict[int, list[int]]:
        standing: dict[int, list[int]] = defaultdict(list)
        for row, depth in self.depth.items():
            standing[depth].append(row)
        return standing

    def step(self) -> Launch[int] | None:
        standing = self.standing()
        launch = self.scheduler.next(standing)
        assert (launch is None) == (not self.depth)
        if launch is None:
            return None
        self.launches += 1
        # Whoever stands there goes along, and only along one stage.
        assert sorted((*launch.members, *launch.later)) == sorted(
            set(standing[launch.first]) | set(launch.later)
        )
        stages = (0, *self.schedule.holds, LAYERS)
        if launch.ending == "each":
            assert stages.index(launch.last) == stages.index(launch.first) + 1
        if launch.ending != "each":
            assert sorted((*launch.members, *launch.later)) == sorted(self.depth)
            return self._go_together(launch)
        for row, depth in self.depth.items():
            if row not in launch.members and depth > 0:
                self.waited[row] = self.waited.get(row, 0) + 1
                self.longest = max(self.longest, self.waited[row])
        for row in launch.members:
            self.waited.pop(row, None)
            self._advance(row, launch.last)
        return launch

    def _go_together(self, launch: Launch[int]) -> Launch[int]:
        """Rows stay at random, where an exit may be, and wait there if others have left."""
        staying = [row for row in launch.members if self.rng.random() < self.stay]
        waits = launch.ending == "wait" and len(staying) < len(launch.members)
        for row in launch.later if waits else ():
            self.waited[row] = self.waited.get(row, 0) + 1
            self.longest = max(self.longest, self.waited[row])
        for row in launch.members:
            if row in staying and waits:
                self.depth[row] = int(self.rng.integers(1, LAYERS))
            else:
                self._advance(row, LAYERS)
        for row in () if waits else launch.later:
            self.waited.pop(row, None)
            self._advance(row, LAYERS)
        return launch

    def _advance(self, row: int, last: int) -> None:
        if last < LAYERS and self.rng.random() < self.stay:
            self.depth[row] = last
            return
        self.depth[row] = 0
        self.left[row] -= 1
        if self.left[row] == 0:
            del self.depth[row]


schedules = st.builds(
    lambda holds, rows, patience: Schedule(
        holds=tuple(sorted(holds)), rows=rows, patience=patience
    ),
    st.sets(st.integers(1, LAYERS - 1), max_size=4),
    st.integers(1, 6),
    st.integers(0, 8),
) | st.builds(
    lambda rows, patience: Schedule(together=True, rows=rows, patience=patience),
    st.integers(1, 6),
    st.integers(0, 8),
)


@settings(max_examples=100, deadline=None)
@given(
    schedule=schedules,
    seed=st.integers(0, 10_000),
    stay=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    tokens=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    admitted=st.lists(st.integers(0, 30), min_size=8, max_size=8),
)
def test_every_row_ends_and_none_waits_beyond_its_patience(
    schedule: Schedule, seed: int, stay: float, tokens: list[int], admitted: list[int]
) -> None:
    simulation = Simulation(schedule, seed, stay)
    work = sum(tokens) * (len(schedule.holds) + 1)  # one row per launch, every stage
    for step in range(work + 40):
        for row, count in enumerate(tokens):
            if admitted[row] == step:
                simulation.admit(row, count)
        simulation.step()
    assert simulation.left == dict.fromkeys(range(len(tokens)), 0)
    assert simulation.launches <= work
    assert simulation.longest <= schedule.patience + len(schedule.holds)


@settings(max_examples=50, deadline=None)
@given(schedule=schedules, seed=st.integers(0, 10_000), stay=st.sampled_from([0.2, 0.5, 0.9]))
def test_rows_that_never_end_all_get_their_turns(
    schedule: Schedule, seed: int, stay: float
) -> None:
    """Also those that begin: no endless traffic at the holds keeps them from it."""
    simulation = Simulation(schedule, seed, stay)
    for row in range(6):
        simulation.admit(row, 10_000)
    last_seen = dict.fromkeys(range(6), 0)
    gap = 0
    for step in range(400):
        launch = simulation.step()
        assert launch is not None
        for row in launch.members if launch.ending != "all" else (*launch.members, *launch.later):
            gap = max(gap, step - last_seen[row])
            last_seen[row] = step
    holds = len(schedule.holds)
    assert gap <= schedule.patience + 1 + holds * (holds + 1) + schedule.together


def test_without_holds_all_rows_launch_through_all_layers() -> None:
    scheduler: Scheduler[str] = Scheduler(LOCKSTEP, LAYERS)
    assert scheduler.next({}) is None
    assert scheduler.next({0: []}) is None
    assert scheduler.next({0: ["a", "b"]}) == Launch(0, LAYERS, ("a", "b"))


def test_enough_waiting_rows_go_deep_before_others_begin() -> None:
    scheduler: Scheduler[str] = Scheduler(Schedule(holds=(3,), rows=2, patience=9), LAYERS)
    assert scheduler.next({0: ["a"], 3: ["b"]}) == Launch(0, 3, ("a",))
    assert scheduler.next({0: ["a"], 3: ["b", "c"]}) == Launch(3, LAYERS, ("b", "c"))


def test_a_row_waits_for_so_many_launches_and_then_goes() -> None:
    scheduler: Scheduler[str] = Scheduler(Schedule(holds=(3,), rows=2, patience=2), LAYERS)
    firsts = []
    for _ in range(3):
        launch = scheduler.next({0: ["a"], 3: ["b"]})
        assert launch is not None
        firsts.append(launch.first)
    assert firsts == [0, 0, 3]


def test_a_row_alone_at_a_hold_has_nothing_to_wait_for() -> None:
    scheduler: Scheduler[str] = Scheduler(Schedule(holds=(3,), rows=4, patience=9), LAYERS)
    assert scheduler.next({3: ["b"]}) == Launch(3, LAYERS, ("b",))


def test_a_row_that_went_and_came_back_waits_anew() -> None:
    scheduler: Scheduler[str] = Scheduler(Schedule(holds=(3,), rows=2, patience=1), LAYERS)
    assert scheduler.next({0: ["a"], 3: ["b"]}) == Launch(0, 3, ("a",))
    assert scheduler.next({0: ["a"], 3: ["b"]}) == Launch(3, LAYERS, ("b",))
    assert scheduler.next({0: ["a"], 3: ["b"]}) == Launch(0, 3, ("a",))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"holds": (3, 2)}, "holds"),
        ({"holds": (2, 2)}, "holds"),
        ({"holds": (0, 2)}, "holds"),
        ({"holds": (2,), "together": True}, "holds"),
        ({"rows": 0}, "rows"),
        ({"patience": -1}, "patience"),
    ],
)
def test_impossible_schedules_are_refused_by_name(options: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Schedule(**options)  # type: ignore[arg-type]  # that is what is refused
    assert refused.value.field == field


def test_a_hold_after_the_last_layer_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Scheduler(Schedule(holds=(2, LAYERS)), LAYERS)
    assert refused.value.field == "holds"
