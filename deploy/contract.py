"""The HTTP contract: what is accepted, what is refused, what comes back (OpenAI's shapes)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offramp.controller.errors import RequestError
from offramp.worker.completion import mean_layer
from offramp.worker.sampling import SamplingParams
from offramp.worker.sequence import TokenEvent

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None,),
    "stop": (None, "", []),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
"""OpenAI fields without support yet, and the values of them that change nothing."""


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class OfframpOptions(BaseModel):
    """The opt-in namespace ``offramp`` of a request."""

    model_config = ConfigDict(extra="forbid")

    stats: bool = Field(default=False, description="Report exit depths and policy generation.")


class CompletionRequest(BaseModel):
    """Body of POST /v1/completions. Unknown fields are accepted and ignored."""

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[int] | list[str]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    offramp: OfframpOptions = OfframpOptions()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        # OpenAI's fields are nullable, and its client sends null for None.
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    def require_supported(self) -> None:
        """Refuse what would silently be dropped.

        Raises:
            RequestError: an OpenAI field that is not supported has a value that matters.
        """
        for field, neutral in NEUTRAL.items():
            value = (self.model_extra or {}).get(field)
            if value not in neutral:
                raise RequestError(field, f"{value!r} is not supported", "Leave it out")

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt.

        Raises:
            RequestError: a list of several prompts.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if all(isinstance(token, int) for token in prompt):
            return [int(token) for token in prompt]
        if len(prompt) != 1:
            raise RequestError(
                "prompt", f"holds {len(prompt)} prompts", "Send one request per prompt"
            )
        return str(prompt[0])

    @property
    def sampling(self) -> SamplingParams:
        """How to draw tokens.

        Raises:
            RequestError: a value outside its range.
        """
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


def chunk(
    request_id: str, created: int, model: str, event: TokenEvent, *, stats: bool
) -> dict[str, Any]:
    """One streamed token."""
    body = _body(request_id, created, model, event.text, event.finish_reason)
    if stats:
        body["offramp"] = {
            "generation": event.generation,
            "exit_layer": event.exit_layer,
            "token": event.token,
        }
    return body


def usage_chunk(
    request_id: str, created: int, model: str, prompt_tokens: int, tokens: int
) -> dict[str, Any]:
    """The last chunk, when usage was asked for."""
    body = _body(request_id, created, model, "", None)
    return {**body, "choices": [], "usage": usage(prompt_tokens, tokens)}


def completion(
    request_id: str,
    created: int,
    model: str,
    prompt_tokens: int,
    events: list[TokenEvent],
    *,
    stats: bool,
) -> dict[str, Any]:
    """The whole answer of a request that does not stream."""
    text = "".join(event.text for event in events)
    body = _body(request_id, created, model, text, events[-1].finish_reason)
    body["usage"] = usage(prompt_tokens, len(events))
    if stats:
        layers = [event.exit_layer for event in events]
        body["offramp"] = {
            "generation": events[-1].generation,
            "exit_layers": layers,
            "mean_exit_layer": mean_layer(layers),
        }
    return body


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """OpenAI's usage block."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def error_body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _body(
    request_id: str,
    created: int,
    model: str,
    text: str,
    finish_reason: Literal["stop", "length"] | None,
) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": request_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
    }
