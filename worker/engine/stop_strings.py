"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets a text through up to the first stop string.

    The first is the one that is complete first, and of several complete at once the longest; so
    what comes out does not depend on how the text is cut into pieces. An end of the text that
    could begin a stop string is held back until that is decided.

    Args:
        stops: The stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str, last: bool = False, *, muted: bool = False) -> tuple[str, bool]:
        """Take the next piece of text.

        Args:
            piece: What follows all earlier pieces.
            last: Nothing follows it, so nothing need be held back.
            muted: A stop string that is complete within this piece does not count.

        Returns:
            The text to show, and whether a stop string was found; then it was the last piece.
        """
        text = self._held + piece
        found = None if muted else self._first(text, len(self._held))
        if found is not None:
            self._held = ""
            return text[:found], True
        held = 0 if last else self._undecided(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def _first(self, text: str, old: int) -> int | None:
        """Where the first stop string begins that ends behind the first ``old`` characters."""
        spans = []
        for stop in self._stops:
            start = text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                spans.append((start + len(stop), start))
        return min(spans)[1] if spans else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that could begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
