"""Text as it becomes readable, token by token."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"
"""What a tokenizer prints for bytes that do not make a character yet."""

CONTEXT_TOKENS = 6
"""Tokens decoded again with each new one, so that joins between tokens come out right."""


class StreamDecoder:
    """Turns one request's tokens into text pieces whose concatenation is the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._shown = 0

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that became readable with this token; "" inside a multi-byte character.

        With ``last``, bytes that never became a character come out as the replacement mark.
        """
        self._tokens.append(token)
        before = self._decode(self._start, self._shown)
        now = self._decode(self._start, len(self._tokens))
        if now.endswith(UNFINISHED) and not last:
            return ""
        self._shown = len(self._tokens)
        self._start = max(self._start, self._shown - CONTEXT_TOKENS)
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
