"""Conversations become prompts, by the template that the model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError

from offramp.controller.errors import RequestError
from offramp.deploy.http.backend import Pool


async def encode_conversation(backend: Pool, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Token ids of a conversation, up to where the model is to speak.

    Raises:
        RequestError: the model has no template, or its template refuses the messages, or they are
            too long.
    """
    encoder = backend.encoder
    text = await encoder.aside(_rendered, backend.tokenizer, messages)
    return encoder.encode(await encoder.aside(partial(encoder.tokens_of, text, rendered=True)))


def _rendered(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError(
            "messages", "the model has no chat template", "Use /v1/completions with a prompt"
        )
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        # Templates raise what they like of roles and orders that they do not know.
        raise RequestError(
            "messages", "the model's chat template refuses them", "Change roles or their order"
        ) from error
