"""The HTTP contract's conversations: messages, and what differs from a completion's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from offramp.controller.errors import RequestError
from offramp.deploy.http.shapes.contract import DecodingFields, Integer
from offramp.deploy.http.shapes.foreign_fields import NEUTRAL_IN_CHATS, require_supported
from offramp.deploy.http.shapes.offramp_options import Nullable
from offramp.worker.decoding.sampling import MOST_LOGPROBS

DEFAULT_TOKENS = 1 << 31
"""More than any context holds: without a bound of its own a reply may fill what is left."""


MOST_MESSAGES = 8192
"""Messages of a conversation, and parts of one: templates make several tokens of each."""


class TextPart(BaseModel):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


def _kind(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class ChatMessage(Nullable):
    """One message of a conversation. Further fields are the template's to read."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES, fail_fast=True), Tag("parts")],
        Discriminator(_kind),
    ] = ""

    @property
    def plain(self) -> dict[str, Any]:
        """The message as templates read it: parts are lines of one text, as in vLLM."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": text}


Conversation = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
]


class ChatRequest(DecodingFields):
    """Body of POST /v1/chat/completions."""

    messages: Conversation
    max_completion_tokens: Integer | None = None
    max_tokens: Integer | None = Field(default=None, description="OpenAI's older name of it.")
    logprobs: bool = False
    top_logprobs: Integer | None = None

    def own_sampling(self) -> dict[str, Any]:
        """How to draw tokens, as far as only conversations say it."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs", "Set logprobs to true")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_LOGPROBS:
            raise RequestError(
                "top_logprobs", f"{self.top_logprobs} is not in [0, {MOST_LOGPROBS}]", "Change it"
            )
        return {
            "max_tokens": DEFAULT_TOKENS if self.most_tokens is None else self.most_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of a reply; None: as many as there is room for."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages as templates read them.

        Raises:
            RequestError: a field with a value that is not supported.
        """
        require_supported(self.model_extra or {}, NEUTRAL_IN_CHATS)
        return [message.plain for message in self.messages]
