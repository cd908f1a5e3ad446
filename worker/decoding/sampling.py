"""What a request asks of its tokens: how they are drawn, and where they end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offramp.controller.errors import RequestError

MOST_SAMPLES = 128
"""Most completions of one prompt, as OpenAI's API has it."""

MOST_LOGPROBS = 20
"""Most alternatives reported per token, as OpenAI's and vLLM's APIs have it."""

MOST_PENALTY = 2.0
"""Bound of the presence and frequency penalties, as OpenAI's API has it."""

MOST_REPETITION = 100.0
"""Bound of the repetition penalty and, inverted, of its reward: no logit overflows."""

MOST_BIAS = 100.0
"""Bound of a logit bias, as OpenAI's API has it."""

SEEDS = 2**63
"""A seed is below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of its tokens. Names and meanings are those of vLLM's class.

    A token is drawn in this order: ``min_tokens``, ``logit_bias``, ``repetition_penalty``,
    ``frequency_penalty`` and ``presence_penalty``, ``temperature``, ``min_p``, ``top_k``,
    ``top_p``.

    Attributes:
        max_tokens: Most tokens to emit, at least 1.
        min_tokens: Before so many were emitted, neither an end-of-sequence token nor one of
            ``stop_token_ids`` is drawn, and no stop string is looked for.
        temperature: 0 decodes greedily; else logits are divided by it.
        top_k: Sample from so many of the most likely tokens (and ties with the last); 0 from all.
        top_p: Sample from the smallest set of tokens that holds this probability, in (0, 1].
        min_p: Leave out tokens less likely than this share of the most likely one's probability,
            in [0, 1].
        repetition_penalty: Divides a positive logit, and multiplies a negative one, of every token
            in the prompt or the output (CTRL, Keskar et al. 2019), in [0.01, 100].
        presence_penalty: Taken off the logit of every token in the output, in [-2, 2].
        frequency_penalty: The same, times how often the output holds the token.
        logit_bias: Added to the logits of these token ids, each in [-100, 100].
        seed: Seed of this request's own generator; None draws a fresh one. Of ``n`` completions
            the i-th, counted from 0, has ``seed + i``. In ``verify`` a seed gives full depth's own
            tokens, whatever was drafted.
        n: Completions of each prompt, independent of one another.
        stop: Strings that end the request with "stop"; neither they nor what follows them is in
            the text. They may spell special tokens, which no text shows.
        stop_token_ids: Tokens that do; such a token is among the token ids, not in the text.
        ignore_eos: Go on past the end-of-sequence token.
        logprobs: Report each token's log-probability and those of so many of the most likely
            tokens; None reports nothing. They are the log-softmax of the logits as the model gave
            them, before all of the above, at the layer where the token left the stack: an early
            exit reports the early exit's distribution.
        prompt_logprobs: Report the same of each prompt token but the first, at full depth; None
            reports nothing.

    Raises:
        RequestError: a value outside its range, naming the field.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_counts(self)
        _require_numbers(self)
        _require_stops(self)
        _require_bias(self.logit_bias)
        _require_seed(self.seed, self.n)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"{self.ignore_eos!r} is no bool", "Use True or False")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    def each(self) -> tuple[SamplingParams, ...]:
        """The ``n`` requests that this one stands for, each with n = 1 and a seed of its own."""
        if self.n == 1:
            return (self,)
        seeds = [None if self.seed is None else self.seed + index for index in range(self.n)]
        return tuple(replace(self, n=1, seed=seed) for seed in seeds)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _require_counts(asked: SamplingParams) -> None:
    _require_count("max_tokens", asked.max_tokens, 1, None, "Ask for 1 or more")
    _require_count("min_tokens", asked.min_tokens, 0, None, "Use 0 for none")
    _require_count("top_k", asked.top_k, 0, None, "Use 0 for all tokens")
    _require_count("n", asked.n, 1, MOST_SAMPLES, "Send several requests for more")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(asked, name)
        if count is not None:
            _require_count(name, count, 0, MOST_LOGPROBS, "Leave it out for none")
    if asked.min_tokens > asked.max_tokens:
        raise RequestError(
            "min_tokens",
            f"{asked.min_tokens} exceeds max_tokens, {asked.max_tokens}",
            "Lower it or raise max_tokens",
        )


def _require_count(name: str, value: int, least: int, most: int | None, remedy: str) -> None:
    within = f"≥ {least}" if most is None else f"in [{least}, {most}]"
    if not (_is_int(value) and least <= value <= (value if most is None else most)):
        raise RequestError(name, f"{value!r} is not an integer {within}", remedy)


def _require_numbers(asked: SamplingParams) -> None:
    if not (_is_finite(asked.temperature) and asked.temperature >= 0):
        raise RequestError(
            "temperature", f"{asked.temperature!r} is not a number ≥ 0", "Use 0 for greedy"
        )
    if not (_is_finite(asked.top_p) and 0 < asked.top_p <= 1):
        raise RequestError("top_p", f"{asked.top_p!r} is not in (0, 1]", "Use 1 for all tokens")
    if not (_is_finite(asked.min_p) and 0 <= asked.min_p <= 1):
        raise RequestError("min_p", f"{asked.min_p!r} is not in [0, 1]", "Use 0 for all tokens")
    _require_penalty("presence_penalty", asked.presence_penalty, -MOST_PENALTY, MOST_PENALTY, 0)
    _require_penalty("frequency_penalty", asked.frequency_penalty, -MOST_PENALTY, MOST_PENALTY, 0)
    least = 1 / MOST_REPETITION
    _require_penalty("repetition_penalty", asked.repetition_penalty, least, MOST_REPETITION, 1)


def _require_penalty(name: str, value: float, least: float, most: float, neutral: int) -> None:
    if not (_is_finite(value) and least <= value <= most):
        raise RequestError(
            name, f"{value!r} is not in [{least:g}, {most:g}]", f"Use {neutral} for no penalty"
        )


def _require_stops(asked: SamplingParams) -> None:
    if not (isinstance(asked.stop, tuple) and all(isinstance(each, str) for each in asked.stop)):
        raise RequestError("stop", f"{asked.stop!r} is no tuple of strings", 'Write ("\\n",)')
    if "" in asked.stop:
        raise RequestError("stop", "holds an empty string", "Leave it out")
    tokens = asked.stop_token_ids
    if not (isinstance(tokens, tuple) and all(map(_is_int, tokens))):
        raise RequestError("stop_token_ids", f"{tokens!r} is no tuple of integers", "Write (2,)")


def _require_bias(logit_bias: Mapping[int, float]) -> None:
    if not isinstance(logit_bias, Mapping):
        raise RequestError("logit_bias", f"{logit_bias!r} is no mapping", "Use {token id: bias}")
    for token, bias in logit_bias.items():
        if type(token) is int and type(bias) is float and -MOST_BIAS <= bias <= MOST_BIAS:
            continue  # like all of most mappings, which may be large
        if not _is_int(token):
            raise RequestError("logit_bias", f"{token!r} is no token id", "Use integers")
        if not (_is_finite(bias) and abs(bias) <= MOST_BIAS):
            raise RequestError(
                "logit_bias",
                f"{bias!r} of token {token} is not in [-{MOST_BIAS:g}, {MOST_BIAS:g}]",
                "Use -100 to forbid a token",
            )


def _require_seed(seed: int | None, n: int) -> None:
    if seed is None:
        return
    if not (_is_int(seed) and 0 <= seed <= SEEDS - n):
        raise RequestError(
            "seed", f"{seed!r} is not an integer in [0, 2^63 - n]", "Use a lower one"
        )
