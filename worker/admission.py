"""What a request must be before it may wait in line."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from operator import index
from typing import Any

from offramp.controller.errors import RequestError
from offramp.controller.features import TABLE_SCHEMAS
from offramp.controller.policy import ExitPolicy

Prompt = str | Sequence[int]
"""Text, or token ids."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one alone or several.

    Raises:
        RequestError: token ids and whole prompts side by side.
    """
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    tokens = [int(item) for item in items if isinstance(item, Integral)]
    if tokens and len(tokens) == len(items):
        return [tokens]
    if tokens:
        raise RequestError("prompts", "mixes token ids and prompts", "Put each prompt in a list")
    return [item for item in items if not isinstance(item, int)]


def encode_prompt(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a prompt.

    Raises:
        RequestError: it is empty, or a string that cannot be encoded, or holds no token ids.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("prompt", "is a string, but the engine has no tokenizer")
        prompt = _encode(prompt, tokenizer)
    try:
        tokens = tuple(index(token) for token in prompt)
    except TypeError as error:
        problem = f"{prompt!r} is neither text nor a list of token ids"
        raise RequestError("prompt", problem, "Use a string or integers") from error
    if not tokens:
        raise RequestError("prompt", "is empty", "Give at least one token")
    return tokens


def _encode(text: str, tokenizer: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "prompt", f"holds half of a surrogate pair at index {error.start}", "Send valid Unicode"
        ) from error
    return list(tokenizer.encode(text))


def require_tokens(field: str, tokens: Sequence[int], vocab: int) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        RequestError: naming the first such token.
    """
    for place, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise RequestError(
                field, f"token {token} at index {place} is not in [0, {vocab})", "Use other ids"
            )


def require_context(prompt_tokens: int, max_tokens: int, context: int) -> None:
    """Refuse what the model's context cannot hold.

    Raises:
        RequestError: naming the three numbers.
    """
    if prompt_tokens + max_tokens > context:
        raise RequestError(
            "max_tokens",
            f"{prompt_tokens} prompt tokens and {max_tokens} new ones exceed the context "
            f"of {context}",
            f"Ask for at most {max(context - prompt_tokens, 0)} or shorten the prompt",
        )


def require_fit(policy: ExitPolicy, layers: int, vocab: int) -> None:
    """Refuse a policy made for another model.

    Raises:
        RequestError: exits out of order or range, or a candidate table that does not fit.
    """
    exits = policy.exits
    if list(exits) != sorted(set(exits)) or any(not 1 <= e <= layers for e in exits):
        raise RequestError(
            "exits", f"{exits} do not ascend within [1, {layers}]", "Use layers of this model"
        )
    if policy.schema is None or policy.schema.digest not in TABLE_SCHEMAS:
        return
    table = policy.candidates_VK
    if table is None or table.shape[0] != vocab or table.min() < 0 or table.max() >= vocab:
        raise RequestError(
            "candidates",
            f"the policy's candidate table does not fit a vocabulary of {vocab}",
            "Train the policy on traces of this model",
        )
