"""Which worker a prompt goes to, by what workers have read and how much they have to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from offramp.deploy.serve.placing import prompt_places
from offramp.deploy.serve.placing.prompt_places import PromptPlaces

WORKERS = ("a", "b", "c")
PROMPT = list(range(300))


@pytest.fixture
def places() -> PromptPlaces:
    return PromptPlaces(chunk=256, slack=2)


def test_the_longest_known_beginning_decides(places: PromptPlaces) -> None:
    other = [*PROMPT[:70], *range(1000, 1200)]
    places.note(places.names(PROMPT, ""), "a")
    places.note(places.names(other, ""), "b")

    def chosen(prompt: Sequence[int], salt: str = "") -> str | None:
        found = places.choose(places.names(prompt, salt), WORKERS, 1)
        assert found is not None
        places.ended(found, 1)
        return found

    assert [chosen(PROMPT[:200]), chosen(other[:200]), chosen(PROMPT), chosen(other)] == list(
        "abab"
    )
    assert {chosen(PROMPT[:70]) for _ in range(50)} == {"a", "b"}  # both have read as much of it
    assert places.kept.total() == 54
    # Shorter than anything kept, or under a salt of its own, it may go anywhere.
    assert {chosen(PROMPT[:31]) for _ in range(50)} == set(WORKERS)
    assert {chosen(PROMPT, f"salt {number}") for number in range(50)} == set(WORKERS)
    assert places.kept.total() == 54
    assert not places.moved


def test_who_has_too_much_to_do_is_relieved_and_who_relieves_knows_it_then(
    places: PromptPlaces,
) -> None:
    names = places.names(PROMPT, "")
    places.note(names, "a")
    first = [places.choose(names, ("a", "b"), 1) for _ in range(4)]
    assert first == ["a", "a", "a", "b"]
    assert (places.kept, places.moved) == ({"a": 3}, {"b": 1})
    then = [places.choose(names, ("a", "b"), 1) for _ in range(6)]
    assert Counter(then) == {"a": 2, "b": 4}
    assert places.moved.total() == 1


def test_a_request_of_many_rows_counts_as_many(places: PromptPlaces) -> None:
    names = places.names(PROMPT, "")
    places.note(names, "a")
    assert places.choose(names, ("a", "b"), 3) == "a"
    assert places.choose(names, ("a", "b"), 1) == "b"
    places.ended("a", 3)
    assert places.choose([], ("a", "b"), 1) == "a"


def test_a_lost_workers_conversations_move_and_stay(places: PromptPlaces) -> None:
    names = places.names(PROMPT, "")
    places.note(names, "a")
    moved = places.choose(names, ("b", "c"), 1)
    assert moved in ("b", "c")
    assert places.choose(names, ("b", "c"), 1) == moved
    assert not places.moved  # nobody was too busy


def test_where_nothing_is_kept_the_idlest_is_named() -> None:
    places = PromptPlaces(chunk=0, slack=1)
    assert places.names(PROMPT, "") == []
    with places.chosen([], WORKERS, 1) as first, places.chosen([], WORKERS, 1) as second:
        third = places.choose([], WORKERS, 1)
        assert {first, second, third} == set(WORKERS)
    assert {places.choose([], WORKERS, 1) for _ in range(2)} == {first, second}
    assert not places.kept
    assert not places.moved


def test_what_was_not_used_for_longest_is_forgotten(
    places: PromptPlaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_places, "MOST_NAMES", 8)
    prompts = [places.names([number, *PROMPT[:70]], "") for number in range(4)]
    for names in prompts:
        places.note(names, "a")
    places.note(prompts[0], "a")
    for number in (4, 5, 6):
        places.note(places.names([number, *PROMPT[:70]], ""), "b")
    places.choose(prompts[0], ("a", "b"), 1)
    assert places.kept == {"a": 1}
    places.choose(prompts[1], ("a", "b"), 1)
    assert places.kept == {"a": 1}
