"""The HTTP contract's requests: what is accepted and what is refused (OpenAI's fields)."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from offramp.controller.errors import RequestError
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.sampling import SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {"suffix": (None, "")}
"""OpenAI fields without support yet, and the values of them that change nothing."""

MOST_STOPS = 4
"""Most stop strings, as OpenAI's API has it."""

MOST_LOGPROBS = 5
"""Most alternatives reported per token, as OpenAI's API has it for completions."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]


class StreamOptions(BaseModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class OfframpOptions(BaseModel):
    """The opt-in namespace ``offramp`` of a request."""

    model_config = ConfigDict(extra="forbid")

    stats: bool = Field(default=False, description="Report exit depths, generation and cost.")
    # Checked in CompletionRequest.kv_mode: the error is to name the field within the namespace.
    kv_mode: Any = Field(
        default=None,
        description="What becomes of skipped layers; the engine's own mode by default.",
        json_schema_extra={"enum": [*get_args(KVMode), None]},
    )


class CompletionRequest(BaseModel):
    """Body of POST /v1/completions. Unknown fields are accepted and ignored.

    From ``top_k`` to ``ignore_eos`` the fields are vLLM's extensions of OpenAI's.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[int] | list[str]
    max_tokens: Integer = 16
    temperature: Number = 1.0
    top_p: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: dict[str, Number] = {}
    seed: Integer | None = None
    n: Integer = 1
    best_of: Integer | None = None
    stop: str | list[str] = []
    logprobs: Integer | None = None
    echo: bool = False
    top_k: Integer = 0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    min_tokens: Integer = 0
    stop_token_ids: list[Integer] = []
    ignore_eos: bool = False
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
        if self.best_of not in (None, self.n):
            raise RequestError(
                "best_of", f"{self.best_of} other than n is not supported", "Leave it out"
            )
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo",
                "with logprobs is not supported: a prompt's tokens have none",
                "Leave one of the two out",
            )

    @property
    def one_prompt(self) -> str | list[int]:
        """Read the one prompt of a request.

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
    def kv_mode(self) -> KVMode | None:
        """What becomes of skipped layers; None leaves it to the engine.

        Raises:
            RequestError: an unknown mode.
        """
        mode: KVMode | None = self.offramp.kv_mode
        if mode is not None and mode not in get_args(KVMode):
            known = ", ".join(get_args(KVMode))
            raise RequestError("offramp.kv_mode", f"{mode!r:.40} is unknown", f"Use one of {known}")
        return mode

    @property
    def sampling(self) -> SamplingParams:
        """How to draw tokens.

        Raises:
            RequestError: a value outside its range.
        """
        if self.logprobs is not None and self.logprobs > MOST_LOGPROBS:
            raise RequestError(
                "logprobs", f"{self.logprobs} exceeds {MOST_LOGPROBS}", "Ask for fewer"
            )
        given = {each.name: getattr(self, each.name) for each in fields(SamplingParams)}
        parsed = {
            "logit_bias": self._bias(),
            "stop": self._stops(),
            "stop_token_ids": tuple(self.stop_token_ids),
        }
        return SamplingParams(**given | parsed)

    def _stops(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        if len(self.stop) > MOST_STOPS:
            raise RequestError(
                "stop", f"holds {len(self.stop)} strings, more than {MOST_STOPS}", "Send fewer"
            )
        return tuple(self.stop)

    def _bias(self) -> dict[int, float]:
        for token in self.logit_bias:
            # 18 digits are more than any vocabulary needs, and fewer than int() refuses.
            if not (token.isascii() and token.isdecimal() and len(token) <= 18):
                raise RequestError(
                    "logit_bias", f"{token!r:.40} is no token id", 'Write {"50": -100}'
                )
        return {int(token): bias for token, bias in self.logit_bias.items()}
