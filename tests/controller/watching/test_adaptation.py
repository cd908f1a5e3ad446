"""A walk among certified settings: how soon it moves, how seldom in vain, never out of range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from offramp.controller.watching.adaptation import MOST_PROOFS, SettingWalk
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.controller.watching.intervals import interval, refutes

SETTINGS = (0.9, 0.5, 0.1)
BOUND = 0.1
Rate = Callable[[int], float]
"""Share of audited tokens that full depth disagrees with, by place."""


def walked(rate: Rate, tokens: int, seed: int = 0) -> tuple[SettingWalk, list[int]]:
    """A walk under traffic, and its place after each token."""
    walk, draws = SettingWalk(SETTINGS, BOUND), np.random.default_rng(seed).random(tokens)
    places = []
    for draw in draws:
        before = walk.place
        moved = walk.tell(bool(draw >= rate(before)))
        assert moved == (walk.place != before)
        assert abs(walk.place - before) <= 1
        places.append(walk.place)
    return walk, places


def test_it_begins_at_what_was_published() -> None:
    walk = SettingWalk(SETTINGS, BOUND)
    assert (walk.setting, walk.place, walk.moves) == (SETTINGS[-1], 2, 0)


@pytest.mark.parametrize(("rate", "tokens"), [(1.0, 10), (0.5, 60), (0.25, 400)])
def test_traffic_that_disagrees_takes_it_to_the_safest_and_no_further(
    rate: float, tokens: int
) -> None:
    for seed in range(20):
        walk, places = walked(lambda _: rate, 2 * tokens, seed)
        assert (walk.place, walk.setting) == (0, SETTINGS[0])
        assert walk.moves == 2
        assert min(places) == 0


def test_traffic_that_agrees_hardly_moves_it_and_brings_it_back() -> None:
    moves = 0
    for seed in range(20):
        walk, _ = walked(lambda _: 0.01, 5000, seed)
        moves += walk.moves
        assert walk.place == 2
        for _ in range(40):
            walk.tell(False)
        assert walk.place == 0
        draws = np.random.default_rng(seed).random(400) < 0.01
        for draw in draws:
            walk.tell(not draw)
        assert walk.place == 2
    assert moves <= 4  # each for nothing, and back; counts began anew some two thousand times


def test_a_good_past_hides_no_change() -> None:
    walk, _ = walked(lambda _: 0.01, 20_000)
    wrong = next(n for n in range(1, 200) if walk.tell(False))
    assert wrong < 30


def test_at_the_bound_itself_it_seldom_moves_in_vain() -> None:
    moved = sum(walked(lambda _: 0.7 * BOUND, 1000, seed)[0].moves > 0 for seed in range(100))
    assert moved <= 5


def test_between_two_neighbours_it_moves_ever_less() -> None:
    """The fast one disagrees too often, the safer one seldom: it would go to and fro for ever."""
    _, places = walked(lambda place: 0.3 if place == 2 else 0.01, 60_000)
    changes = np.flatnonzero(np.diff(places))
    first, last = changes[changes < 20_000], changes[changes >= 40_000]
    assert len(first) > 2 * len(last)
    assert len(last) >= 1  # it goes on trying, after MOST_PROOFS proofs at the latest
    assert MOST_PROOFS == 64
    assert np.mean(np.asarray(places) == 2) < 0.1


def test_what_it_tests_is_the_interval() -> None:
    for hits, seen in ((0, 50), (5, 50), (30, 50), (50, 50)):
        least, most = interval(hits, seen, 0.9)
        for rate in (0.02, 0.1, 0.5, 0.9):
            assert refutes(hits, seen, rate, 0.9) == (not least <= rate <= most)


def watch_of(told: list[float], tripped: list[str], most: float = 0.99) -> PolicyWatch:
    bounds = Guardrails(max_disagreement=most, adapt_above=BOUND)
    walk = SettingWalk(SETTINGS, BOUND)
    return PolicyWatch(bounds, tripped.append, 3, walk, told.append)


def test_only_tokens_of_the_present_setting_count() -> None:
    told: list[float] = []
    watch = watch_of(told, [])
    for _ in range(100):
        watch.judge(False, SETTINGS[0])
        watch.judge(False)
    assert told == []
    for _ in range(50):  # those after the move are of requests that began before
        watch.judge(False, SETTINGS[2])
    assert told == [SETTINGS[1]]
    assert (watch.tally.point, watch.tally.points, watch.tally.moves) == (2, 3, 1)
    watch.count_anew()
    assert (watch.tally.audited, watch.tally.point, watch.tally.moves) == (0, 2, 1)


def test_a_release_that_trips_moves_no_more() -> None:
    told: list[float] = []
    tripped: list[str] = []
    watch = watch_of(told, tripped, most=0.2)
    for _ in range(200):
        watch.judge(False, SETTINGS[2 - len(told)])
    assert len(tripped) == 1
    assert told == list(SETTINGS[1::-1])


def test_without_a_walk_nothing_moves() -> None:
    told: list[float] = []
    watch = PolicyWatch(Guardrails(), print, 3, None, told.append)
    for _ in range(300):
        watch.judge(False, SETTINGS[2])
    assert (told, watch.tally.points) == ([], 0)
