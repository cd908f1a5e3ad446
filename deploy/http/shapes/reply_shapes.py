"""The shapes of replies, for /openapi.json; a test holds what is sent against them."""

from __future__ import annotations

from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic reads these before Python 3.12
)

from typing_extensions import TypedDict

from offramp.deploy.http.shapes.token_texts import ChatLogprobs, LegacyLogprobs
from offramp.worker.decoding.request import FinishReason


class PromptTokens(TypedDict):
    """What became of a prompt's tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class CompletionChoice(TypedDict):
    """One completion."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: FinishReason
    offramp: NotRequired[dict[str, Any]]


class CompletionReply(TypedDict):
    """Reply of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    offramp: NotRequired[dict[str, Any]]


class AssistantMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    offramp: NotRequired[dict[str, Any]]


class ChatReply(TypedDict):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    offramp: NotRequired[dict[str, Any]]


class ModelCard(TypedDict):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """Every served model."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeReply(TypedDict):
    """Tokens of a text, as vLLM reports them."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(TypedDict):
    """Text of tokens."""

    prompt: str


class VersionReply(TypedDict):
    """What runs here."""

    version: str


class StateReply(TypedDict):
    """How a server is; of several models, how each is."""

    status: str
    outstanding: NotRequired[int]
    models: NotRequired[dict[str, str]]


class ErrorFields(TypedDict):
    """What went wrong; ``param`` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """OpenAI's error body."""

    error: ErrorFields
