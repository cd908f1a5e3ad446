"""Prompts become token ids, and what is far too long is refused before the work of encoding it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from numbers import Integral
from operator import index
from typing import Any, TypeVar

from offramp.controller.errors import RequestError
from offramp.worker.engine.admission import require_context
from offramp.worker.engine.detokenize import decode

Result = TypeVar("Result")

Prompt = str | Sequence[int]
"""Text, or token ids."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one alone or several.

    Raises:
        RequestError: token ids and whole prompts side by side, or no prompts at all.
    """
    if isinstance(prompts, str):
        return [prompts]
    given: object = prompts  # callers need not keep to the annotation
    if not isinstance(given, Iterable):
        problem = f"{prompts!r} is neither text nor a list"
        raise RequestError("prompts", problem, "Use strings or lists of token ids")
    items: list[Any] = list(prompts)
    # Of each kind once: to ask each item takes ten times as long, and there may be many.
    are_tokens = {issubclass(kind, Integral) for kind in set(map(type, items))}
    if are_tokens == {True}:
        return [list(map(int, items))]
    if len(are_tokens) > 1:
        raise RequestError("prompts", "mixes token ids and prompts", "Put each prompt in a list")
    return items


def prompt_text(prompt: Prompt, tokenizer: Any) -> str:
    """A prompt as text, to be echoed: a string as it is, token ids without the special ones.

    Raises:
        RequestError: it is token ids, and there is no tokenizer, or it cannot decode them.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise RequestError("echo", "of token ids needs a tokenizer, and the engine has none")
    try:
        return decode(tokenizer, prompt)
    except Exception as error:  # tokenizers raise what they like of ids that they do not know
        problem = "of token ids that the tokenizer cannot decode"
        raise RequestError("echo", problem, "Leave it out") from error


class PromptEncoder:
    """Encodes the prompts of one engine, from any thread, but one at a time.

    Args:
        tokenizer: None if prompts are token ids only.
        context: Tokens that a row holds at most.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context
        # Long prompts take seconds, which nobody else is to wait for. One thread, since a tokenizer
        # need not bear several; idle, it ends with this object.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offramp-encoder")

    async def aside(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do work with the tokenizer in its own thread, where no event loop waits for it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            RequestError: it is empty or too long, or a string that cannot be encoded, or holds no
                token ids.
        """
        if isinstance(prompt, str):
            prompt = self.tokens_of(prompt)
        try:
            require_context(len(prompt), 0, self._context)
            tokens = tuple(index(token) for token in prompt)
        except TypeError as error:
            problem = f"{prompt!r:.60} is neither text nor a list of token ids"
            raise RequestError("prompt", problem, "Use a string or integers") from error
        if not tokens:
            raise RequestError("prompt", "is empty", "Give at least one token")
        return tokens

    def tokens_of(self, text: str, *, rendered: bool = False) -> list[int]:
        """Token ids of a text, perhaps none.

        Args:
            text: What to encode.
            rendered: It comes from a template, which wrote the special tokens itself.

        Raises:
            RequestError: it is far too long, or cannot be encoded.
        """
        if self._tokenizer is None:
            raise RequestError("prompt", "is a string, but the engine has no tokenizer")
        self._require_text(text)
        if rendered:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        return list(self._tokenizer.encode(text))

    def pair_of(self, first: str, second: str, fields: tuple[str, str]) -> list[int]:
        """Token ids of two texts as one sequence, with the tokenizer's marks between them.

        An empty first text leaves the second alone.

        Args:
            first, second: The texts.
            fields: What errors call them.

        Raises:
            RequestError: one is far too long or cannot be encoded, has no token, or they are over
                the context; the first is named where it is so by itself.
        """
        tokenizer = self._tokenizer
        for text, field in zip((first, second), fields, strict=True):
            self._require_text(text, field)
        tokens = tokenizer.encode(first, second) if first else tokenizer.encode(second)
        marks = tokenizer.num_special_tokens_to_add(bool(first))
        is_long = len(tokens) > self._context
        alone = len(tokenizer.encode(first)) if is_long and first else 0
        field = fields[0 if alone > self._context else 1]
        require_length(field, len(tokens), self._context, marks)
        return list(tokens)

    @cached_property
    def most_bytes(self) -> int:
        """Bytes of UTF-8 that a string may have at most.

        As many as the context holds if all of its tokens are the longest there is; not one byte
        more can be encoded in it, but by a tokenizer that drops some of its text.
        """
        return self._context * max(len(entry.encode()) for entry in self._tokenizer.get_vocab())

    def _require_text(self, text: str, field: str = "prompt") -> None:
        # Characters are counted first: that takes no time, and each is a byte or more.
        size = len(text)
        if size <= self.most_bytes:
            size = require_unicode(field, text)
        if size > self.most_bytes:
            raise RequestError(
                field,
                f"has {size} bytes or more, and the {self._context} tokens of the context hold "
                f"{self.most_bytes} at most",
                "Shorten it",
            )


def require_unicode(field: str, text: str) -> int:
    """Bytes of a text in UTF-8.

    Raises:
        RequestError: it has none, for it holds half of a surrogate pair.
    """
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        problem = f"holds half of a surrogate pair at index {error.start}"
        raise RequestError(field, problem, "Send valid Unicode") from error


def require_length(field: str, tokens: int, context: int, marks: int = 0) -> None:
    """Refuse a text of no token, or of more than the context.

    Args:
        field: What errors name it.
        tokens: Tokens of the text, those included that the tokenizer sets around it.
        context: Most tokens of a sequence.
        marks: How many of them it sets.

    Raises:
        RequestError: naming the field.
    """
    if tokens <= marks:
        raise RequestError(field, "has no token", "Leave it out, or give it words")
    if tokens > context:
        problem = f"has {tokens} tokens, and the model's context is {context}"
        raise RequestError(field, problem, "Shorten it")
