"""Stop strings, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.worker.engine.detokenize import StopStrings

text = st.text("ab\n", max_size=14)
stops = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def shown_by(matcher: StopStrings, pieces: list[str], *, ends: bool) -> tuple[str, bool]:
    """All that is shown of the pieces, and whether a stop string was found."""
    shown = ""
    for index, piece in enumerate(pieces):
        more, stopped = matcher.push(piece, ends and index == len(pieces) - 1)
        shown += more
        if stopped:
            return shown, True
    return shown, False


def up_to_first(whole: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the text before the stop string that is complete first."""
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


@settings(deadline=None, max_examples=500)
@given(pieces=st.lists(text, min_size=1, max_size=8), stops=stops)
def test_what_is_shown_is_the_text_up_to_the_first_stop(
    pieces: list[str], stops: list[str]
) -> None:
    assert shown_by(StopStrings(stops), pieces, ends=True) == up_to_first("".join(pieces), stops)


@settings(deadline=None, max_examples=300)
@given(pieces=st.lists(text, min_size=1, max_size=8), stops=stops)
def test_only_what_could_begin_a_stop_string_is_held_back(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    shown, stopped = shown_by(StopStrings(stops), pieces, ends=False)
    if stopped:
        assert (shown, True) == up_to_first(whole, stops)
        return
    held = whole.removeprefix(shown)
    assert shown + held == whole
    assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    # Nothing longer could still become a stop string.
    for start in range(len(shown)):
        assert not any(stop.startswith(whole[start:]) for stop in stops)


@settings(deadline=None, max_examples=300)
@given(early=text, pieces=st.lists(text, min_size=1, max_size=6), stops=stops)
def test_while_muted_nothing_stops_but_a_stop_string_may_begin(
    early: str, pieces: list[str], stops: list[str]
) -> None:
    whole = early + "".join(pieces)
    expected = whole, False
    for end in range(len(early) + 1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            expected = whole[: end - max(map(len, complete))], True
            break
    matcher = StopStrings(stops)
    first, stopped = matcher.push(early, muted=True)
    assert not stopped
    rest, stopped = shown_by(matcher, pieces, ends=True)
    assert (first + rest, stopped) == expected


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopStrings(())
    assert [matcher.push(piece) for piece in ("a", "", "b")] == [
        ("a", False),
        ("", False),
        ("b", False),
    ]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["</s>"], ["one <", "/", "s", "> two"], ["one ", "", "", ""]),
        (["</s>"], ["one <", "/b>"], ["one ", "</b>"]),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""]),
        (["abcd", "bc"], ["a", "b", "c"], ["", "", "a"]),
        (["bc", "abc"], ["x", "abc"], ["x", ""]),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: list[str]) -> None:
    matcher = StopStrings(stops)
    assert [matcher.push(piece)[0] for piece in pieces] == shown
