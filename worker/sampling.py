"""How the next token is drawn from logits.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.controller.errors import RequestError

COLDEST = 1e-37
"""Lower temperatures count as this one: float32 would round them to 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a request asks of its tokens.

    Attributes:
        max_tokens: Most tokens to emit, at least 1.
        temperature: 0 decodes greedily; else logits are divided by it.
        top_p: Sample from the smallest set of tokens that holds this probability, in (0, 1].
        seed: Seed of this request's own generator; None draws a fresh one.
        ignore_eos: Go on past the end-of-sequence token.

    Raises:
        RequestError: a value outside its range, naming the field.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise RequestError(
                "max_tokens", f"{self.max_tokens!r} is not an integer ≥ 1", "Ask for 1 or more"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(
                "temperature", f"{self.temperature} is not a number ≥ 0", "Use 0 for greedy"
            )
        if not 0 < self.top_p <= 1:
            raise RequestError("top_p", f"{self.top_p} is not in (0, 1]", "Use 1 for all tokens")
        if self.seed is not None and not _is_seed(self.seed):
            raise RequestError("seed", f"{self.seed!r} is not an integer in [0, 2^63)")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def _is_seed(seed: object) -> bool:
    return isinstance(seed, int) and 0 <= seed < 2**63


def new_generator(sampling: SamplingParams) -> torch.Generator | None:
    """The request's own random generator; None if it decodes greedily."""
    if sampling.greedy:
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def distribution(logits_V: Tensor, sampling: SamplingParams) -> Tensor:
    """Probabilities [V] at a temperature, of the nucleus only (Holtzman et al. 2020)."""
    logits_V = logits_V.float().cpu()
    # Below the best logit all are negative, so that no division overflows to infinity.
    below_V = (logits_V - logits_V.max()) / max(sampling.temperature, COLDEST)
    probabilities_V = below_V.softmax(-1)
    if sampling.top_p < 1:
        probabilities_V = _nucleus(probabilities_V, sampling.top_p)
        probabilities_V /= probabilities_V.sum()
    return probabilities_V


def pick(chances_V: Tensor, generator: torch.Generator) -> int:
    """One token, drawn."""
    return int(torch.multinomial(chances_V, 1, generator=generator))


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    ordered, order = probabilities_V.sort(descending=True)
    # A token stays if the mass before it is below top_p, so at least the best one does.
    before = ordered.cumsum(-1) - ordered
    keep = before < top_p
    keep[0] = True  # a top_p that float32 rounds to 0
    kept = torch.where(keep, ordered, 0.0)
    return torch.zeros_like(probabilities_V).scatter_(0, order, kept)
