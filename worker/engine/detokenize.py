"""Text as it becomes readable, token by token, and stop strings in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from offramp.controller.errors import DecodeFailedError

UNFINISHED = "\ufffd"
"""What a tokenizer prints for bytes that do not make a character yet."""

CONTEXT_TOKENS = 6
"""At least so many are decoded again with each new one, so that joins come out right; at twice as
many, all but these are let go. So only every so often is the same text decoded twice."""


FIRST_MARK = 0xD800
"""Where half surrogate pairs begin; there are 2048."""

LONGEST_CHARACTER = 4
"""Bytes, and so tokens, that one character takes at most in UTF-8."""


class StreamDecoder:
    """Turns one request's tokens into text pieces whose concatenation is the whole text.

    That is what the tokens read as behind the prompt: a decoder of the SentencePiece kind drops a
    space that its text begins with, and the completion's first space is in the middle of a text.

    Args:
        tokenizer: Decodes the tokens.
        prompt: Token ids that come before them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._tokens = self._context(prompt)
        # Where shown text ended: only there may decoding begin, since a decoder with byte fallback
        # spoils every byte that follows half a character.
        self._ends = deque(sorted({0, len(self._tokens)}))
        # What is shown of the tokens from the first of these ends on; None: not decoded yet.
        self._shown: str | None = None

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that became readable with this token; "" inside a multi-byte character.

        With ``last``, bytes that never became a character come out as the replacement mark.

        Raises:
            DecodeFailedError: the tokenizer cannot decode the token.
        """
        self._tokens.append(token)
        try:
            return self._readable(last=last)
        except Exception as error:  # a tokenizer may not know every id that a head can give
            raise DecodeFailedError(
                f"token {token} has no text: the tokenizer cannot decode it. Forbid it by "
                f'logit_bias, {{"{token}": -100}}'
            ) from error

    def flush(self) -> str:
        """What is left when no token follows: the replacement mark for half a character."""
        return self._readable(last=True)

    def _readable(self, *, last: bool) -> str:
        start, shown, count = self._ends[0], self._ends[-1], len(self._tokens)
        before = self._decode(start, shown) if self._shown is None else self._shown
        now = self._decode(start, count)
        if now.endswith(UNFINISHED) and not last:
            self._shown = before
            return ""
        self._ends.append(count)
        self._shown = now
        if start < count - 2 * CONTEXT_TOKENS:
            self._shown = None
            while self._ends[1] <= count - CONTEXT_TOKENS:
                self._ends.popleft()
        if not now.startswith(before):  # a prompt of token ids ended inside a character
            before = before.rstrip(UNFINISHED) or before
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return decode(self.tokenizer, self._tokens[start:end])

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from the beginning of a character on."""
        tails = [
            list(prompt[-count:])
            for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + LONGEST_CHARACTER)
        ]
        try:
            whole = (each for each in tails if not self._begins_inside(each))
            return next(whole, tails[0])
        except Exception:  # ids of a prompt may be none of the tokenizer's; then none is context
            return []

    def _begins_inside(self, tokens: list[int]) -> bool:
        """Whether the first of the tokens continues a character."""
        return decode(self.tokenizer, tokens).startswith(UNFINISHED)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What tokens read as, special ones left out."""
    # Cleaning up would take back spaces that have been shown already.
    return str(
        tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


class SpecialTokens:
    """The special tokens that some stop strings spell, which no text shows.

    Each is given a mark, half of a surrogate pair, which no text has either. With it in the place
    of the token, a stop string is looked for in the text as any other.

    Args:
        tokenizer: Says which tokens are special.
        stops: The stop strings.

    Attributes:
        stops: The stop strings as given, and those that spell special tokens with marks as well:
            the model may also write the same characters as text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        named = _special_tokens(tokenizer) if stops else {}
        spelt = [name for name in named if any(name in stop for stop in stops)]
        # Of two names that begin alike, the longer is looked for first.
        spelt.sort(key=len, reverse=True)
        marks = {name: chr(FIRST_MARK + index) for index, name in enumerate(spelt)}
        self._marks = {named[name]: mark for name, mark in marks.items()}
        self.stops = tuple(dict.fromkeys((*stops, *(_replaced(stop, marks) for stop in stops))))

    def mark(self, token: int) -> str:
        """What stands for a token where stop strings are looked for; "" for most."""
        return self._marks.get(token, "")

    def without_marks(self, text: str) -> str:
        """The text as it may be shown."""
        return _replaced(text, dict.fromkeys(self._marks.values(), ""))


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that decoding leaves out, by what they are called."""
    added = {
        str(each): token for token, each in tokenizer.added_tokens_decoder.items() if each.special
    }
    return dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)) | added


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


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
