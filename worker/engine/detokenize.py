"""Text as it becomes readable, token by token."""

from __future__ import annotations

from collections import deque
from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer prints for bytes that do not make a character yet."""

CONTEXT_TOKENS = 6
"""At least so many are decoded again with each new one, so that joins come out right."""


class StreamDecoder:
    """Turns one request's tokens into text pieces whose concatenation is the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        # Where shown text ended: only there may decoding begin, since a decoder with byte fallback
        # spoils every byte that follows half a character.
        self._ends = deque([0])

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that became readable with this token; "" inside a multi-byte character.

        With ``last``, bytes that never became a character come out as the replacement mark.
        """
        self._tokens.append(token)
        return self._readable(last=last)

    def flush(self) -> str:
        """What is left when no token follows: the replacement mark for half a character."""
        return self._readable(last=True)

    def _readable(self, *, last: bool) -> str:
        start, shown, count = self._ends[0], self._ends[-1], len(self._tokens)
        before = self._decode(start, shown)
        now = self._decode(start, count)
        if now.endswith(UNFINISHED) and not last:
            return ""
        self._ends.append(count)
        while self._ends[1] <= count - CONTEXT_TOKENS:
            self._ends.popleft()
        return now[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        # Cleaning up would take back spaces that have been shown already.
        return str(
            self.tokenizer.decode(
                self._tokens[start:end],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )
