"""The HTTP contract's requests: what is accepted and what is refused (OpenAI's fields)."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from offramp.controller.errors import RequestError
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.sampling import SamplingParams

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's and vLLM's.
    "suffix": ("",),
    "response_format": ({}, {"type": "text"}),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
        ("", [], {}, False),
    ),
    # Those of SGLang, llama.cpp and Hugging Face that change tokens.
    **dict.fromkeys(("regex", "ebnf", "grammar", "json_schema", "stop_regex"), ("", [], {})),
    "custom_logit_processor": ("",),
    "lora_path": ("",),
    "no_stop_trim": (False,),
    "do_sample": (True,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "samplers": ([],),
    **dict.fromkeys(("top_a", "dry_multiplier", "xtc_probability", "dynatemp_range"), (0,)),
}
"""Fields of others' without support here, and the values of them that change nothing (as null)."""

OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
"""What other servers call fields that are supported here, by that name."""

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


class _Nullable(BaseModel):
    """Fields of a request, of which null means absent.

    OpenAI's fields are nullable, and its client sends null for None.
    """

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}


class StreamOptions(_Nullable):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class OfframpOptions(_Nullable):
    """The opt-in namespace ``offramp`` of a request."""

    model_config = ConfigDict(extra="forbid")

    stats: bool = Field(default=False, description="Report exit depths, generation and cost.")
    # Checked in CompletionRequest.kv_mode: the error is to name the field within the namespace.
    kv_mode: Any = Field(
        default=None,
        description="What becomes of skipped layers; the engine's own mode by default.",
        json_schema_extra={"enum": [*get_args(KVMode), None]},
    )


class CompletionRequest(_Nullable):
    """Body of POST /v1/completions. Unknown fields are accepted and ignored.

    Fields that are known to change the tokens elsewhere, and would not here, are refused.
    From ``top_k`` to ``ignore_eos`` the fields are vLLM's extensions of OpenAI's.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    prompt: str | list[int] | list[str] | list[list[int]]
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

    def require_supported(self) -> None:
        """Refuse what would silently be dropped.

        Raises:
            RequestError: a field that is not supported has a value that matters, or a supported
                one has another name.
        """
        for field, value in (self.model_extra or {}).items():
            if field in OTHER_NAMES:
                raise RequestError(field, "is not this API's name", f"Call it {OTHER_NAMES[field]}")
            if field in NEUTRAL and value not in NEUTRAL[field]:
                raise RequestError(field, f"{value!r:.40} is not supported", "Leave it out")
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
        tokens = [item for item in prompt if isinstance(item, int)]
        if len(tokens) == len(prompt):
            return tokens
        if len(prompt) != 1:
            raise RequestError(
                "prompt", f"holds {len(prompt)} prompts", "Send one request per prompt"
            )
        [only] = [item for item in prompt if not isinstance(item, int)]
        return only

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
            # As in vLLM, -1 stands for none.
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "seed": None if self.seed == -1 else self.seed,
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
