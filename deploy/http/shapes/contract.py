"""The HTTP contract's requests: what is accepted and what is refused (OpenAI's fields)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import fields
from itertools import chain
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator

from offramp.controller.errors import RequestError
from offramp.deploy.http.shapes.foreign_fields import NEUTRAL, require_supported
from offramp.deploy.http.shapes.offramp_options import Nullable, OfframpOptions, prefill_of, wish_of
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish
from offramp.worker.decoding.sampling import (
    MOST_PENALTY,
    MOST_REPETITION,
    MOST_SAMPLES,
    SEEDS,
    SamplingParams,
)
from offramp.worker.engine.encoding import Prompt, as_prompts

MOST_STOPS = 4
"""Most stop strings, as OpenAI's API has it."""

LONGEST_STOP = 1024
"""Characters of a stop string: each token's text is compared with all of it."""

MOST_LOGPROBS = 5
"""Most alternatives reported per token, as OpenAI's API has it for completions."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not a boolean")
    return value


def _no_bools(values: Any) -> Any:
    """The same of many at once: to ask Python of each takes ten times as long as all the rest."""
    items = values.values() if isinstance(values, dict) else values
    if isinstance(items, Iterable) and bool in set(map(type, items)):
        raise ValueError("Input should hold numbers, not booleans")
    return values


Integer = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Integers = Annotated[list[int], Field(fail_fast=True), BeforeValidator(_no_bools)]


class StreamOptions(Nullable):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


def _within(default: Any, **bounds: float) -> Any:
    """A field whose bounds /openapi.json tells; SamplingParams holds values to them."""
    return Field(default=default, json_schema_extra={**bounds})


class DecodingFields(Nullable):
    """What completions and conversations have in common. Unknown fields are ignored.

    Fields that are known to change the tokens elsewhere, and would not here, are refused.
    From ``top_k`` to ``ignore_eos``, and ``cache_salt``, the fields are vLLM's extensions of
    OpenAI's.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Number = _within(1.0, minimum=0)
    top_p: Number = _within(1.0, exclusiveMinimum=0, maximum=1)
    presence_penalty: Number = _within(0.0, minimum=-MOST_PENALTY, maximum=MOST_PENALTY)
    frequency_penalty: Number = _within(0.0, minimum=-MOST_PENALTY, maximum=MOST_PENALTY)
    logit_bias: Annotated[dict[str, float], BeforeValidator(_no_bools)] = _within({})
    seed: Integer | None = _within(None, minimum=-1, exclusiveMaximum=SEEDS)
    n: Integer = _within(1, minimum=1, maximum=MOST_SAMPLES)
    stop: str | list[str] = _within([], maxItems=MOST_STOPS, maxLength=LONGEST_STOP)
    top_k: Integer = _within(0, minimum=-1)
    min_p: Number = _within(0.0, minimum=0, maximum=1)
    repetition_penalty: Number = _within(1.0, minimum=1 / MOST_REPETITION, maximum=MOST_REPETITION)
    min_tokens: Integer = _within(0, minimum=0)
    stop_token_ids: Integers = _within([])
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="What is kept of the prompt serves only requests with the same salt.",
    )
    offramp: OfframpOptions = OfframpOptions()

    @property
    def counts(self) -> bool:
        """Whether a stream is to count its tokens in a last chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def kv_mode(self) -> KVWish | None:
        """What becomes of skipped layers; None leaves it to the engine. Raises as ``wish_of``."""
        return wish_of(self.offramp)

    @property
    def prefill(self) -> Prefill | None:
        """How prompts are read; None leaves it to the engine. Raises as ``prefill_of``."""
        return prefill_of(self.offramp)

    @abstractmethod
    def own_sampling(self) -> dict[str, Any]:
        """How to draw tokens, as far as completions and conversations say it differently."""

    @property
    def sampling(self) -> SamplingParams:
        """How to draw tokens.

        Raises:
            RequestError: a value outside its range.
        """
        names = {each.name for each in fields(SamplingParams)} & set(DecodingFields.model_fields)
        parsed = {
            "logit_bias": self._bias(),
            "stop": self._stops(),
            "stop_token_ids": tuple(self.stop_token_ids),
            # As in vLLM, -1 stands for none.
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "seed": None if self.seed == -1 else self.seed,
        }
        given = {name: getattr(self, name) for name in names}
        return SamplingParams(**given | parsed | self.own_sampling())

    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MOST_STOPS:
            raise RequestError(
                "stop", f"holds {len(stops)} strings, more than {MOST_STOPS}", "Send fewer"
            )
        longest = max(map(len, stops), default=0)
        if longest > LONGEST_STOP:
            raise RequestError(
                "stop", f"holds {longest} characters, more than {LONGEST_STOP}", "Shorten it"
            )
        return () if self.stop == "" else stops

    def _bias(self) -> dict[int, float]:
        for token in self.logit_bias:
            # 18 digits are more than any vocabulary needs, and fewer than int() refuses.
            if not (token.isascii() and token.isdecimal() and len(token) <= 18):
                raise RequestError(
                    "logit_bias", f"{token!r:.40} is no token id", 'Write {"50": -100}'
                )
        return {int(token): bias for token, bias in self.logit_bias.items()}


def _prompt(given: Any) -> Any:
    """A prompt as it is: pydantic would try each kind in turn, and note each item that is none."""
    if isinstance(given, list):
        kinds = set(map(type, given))
        is_nested = kinds == {list}
        if is_nested:
            kinds = set(map(type, chain.from_iterable(given)))
        if kinds <= {int} or (kinds == {str} and not is_nested):
            return given
        if kinds <= {int, float}:
            return [_whole(each) for each in given] if is_nested else _whole(given)
    elif isinstance(given, str):
        return given
    raise ValueError("Input should be a string, a list of token ids, or a list of either")


def _whole(numbers: list[float]) -> list[int]:
    """Token ids that were written as 1.0, which is an integer in JSON."""
    try:
        tokens = list(map(int, numbers))
    except (ValueError, OverflowError):  # JSON as Python reads it knows NaN and Infinity
        tokens = []
    if tokens != numbers:
        raise ValueError("Input should hold token ids, and one is no integer")
    return tokens


Prompts = str | list[int] | list[str] | list[list[int]]


class CompletionRequest(DecodingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[Prompts, PlainValidator(_prompt, json_schema_input_type=Prompts)]
    max_tokens: Integer = _within(16, minimum=0)
    best_of: Integer | None = _within(None, minimum=1)
    logprobs: Integer | None = _within(None, minimum=0, maximum=MOST_LOGPROBS)
    echo: bool = False

    def own_sampling(self) -> dict[str, Any]:
        """How to draw tokens, as far as only completions say it."""
        if self.logprobs is not None and self.logprobs > MOST_LOGPROBS:
            raise RequestError(
                "logprobs", f"{self.logprobs} exceeds {MOST_LOGPROBS}", "Ask for fewer"
            )
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens", "0 asks for nothing without echo", "Ask for 1 or more")
        # The best of several are told by their log-probabilities, whether these are reported or no.
        unasked = 0 if self.candidates > self.n else None
        return {
            # Prompts alone are judged, too, by reading them: what that makes is not shown.
            "max_tokens": self.max_tokens or 1,
            "n": self.candidates,
            "logprobs": unasked if self.logprobs is None else self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
        }

    @property
    def candidates(self) -> int:
        """Completions made per prompt, of which the ``n`` likeliest are shown.

        Raises:
            RequestError: fewer than are to be shown, or a choice that a stream cannot make.
        """
        if self.best_of is None:
            return self.n
        if self.best_of < self.n:
            raise RequestError("best_of", f"{self.best_of} is below n", "Raise it or lower n")
        if self.stream and self.best_of > self.n:
            raise RequestError("best_of", "cannot be chosen in a stream", "Leave one of them out")
        return self.best_of

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, one or several.

        Raises:
            RequestError: a field with a value that is not supported.
        """
        require_supported(self.model_extra or {}, NEUTRAL)
        return as_prompts(self.prompt) or [[]]  # one that is empty is refused by name
