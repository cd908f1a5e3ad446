"""One request's way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from offramp.worker.candidates import NgramIndex
from offramp.worker.sampler import Sampler
from offramp.worker.sampling import SamplingParams
from offramp.worker.snapshot import PolicySnapshot

FinishReason = Literal["stop", "length"]

TopLogprobs = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller submits.

    Attributes:
        id: Unique within the engine.
        prompt: Token ids, at least one.
        sampling: How to draw tokens, and how many.
        snapshot: The policy, pinned until the request ends.
        forced: Tokens to feed instead of the emitted ones (teacher forcing); () feeds the emitted.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    snapshot: PolicySnapshot
    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One emitted token.

    Attributes:
        request_id: Whose token.
        token: Its id.
        text: The text that became readable with it ("" inside a multi-byte character, or while
            it could begin a stop string).
        exit_layer: Layers executed for it.
        generation: Generation of the policy that decided it (0: built-in full depth).
        finish_reason: Set on the last token only.
        logprob: Its log-probability (natural) at the layer it left from, under the logits as the
            model gave them; None if not asked for.
        top_logprobs: The most likely tokens there and their log-probabilities, best first.
        text_offset: Characters of the completion's text before the token's own.
    """

    request_id: str
    token: int
    text: str
    exit_layer: int
    generation: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    text_offset: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request: its row in the cache and what it has emitted.

    ``finish_reason`` is also set from outside, once the text is seen to hold a stop string.
    """

    request: Request
    slot: int
    sampler: Sampler
    emitted: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ngrams: NgramIndex | None = None

    def __post_init__(self) -> None:
        if self.request.snapshot.policy.candidates_VK is not None:
            self.ngrams = NgramIndex(self.request.prompt)

    @property
    def position(self) -> int:
        """Position of the next token to feed: entries in the cache so far."""
        return len(self.request.prompt) + len(self.emitted) - 1

    @property
    def next_input(self) -> int:
        """The token to feed next."""
        last = len(self.emitted) - 1
        return self.request.forced[last] if self.request.forced else self.emitted[last]

    @property
    def is_finished(self) -> bool:
        """Whether the last token was emitted."""
        return self.finish_reason is not None

    def advance(self, logits_V: Tensor, exit_layer: int, eos_tokens: frozenset[int]) -> None:
        """Draw the next token from logits [V] and record it."""
        drawn = self.sampler.draw(logits_V, self.emitted)
        self.emit(drawn.token, exit_layer, eos_tokens, logprob=drawn.logprob, top=drawn.top)

    def emit(
        self,
        token: int,
        exit_layer: int,
        eos_tokens: frozenset[int],
        *,
        logprob: float | None = None,
        top: TopLogprobs = (),
    ) -> None:
        """Record an emitted token and see whether it is the last."""
        self.emitted.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.exit_layers.append(exit_layer)
        self.generations.append(self.request.snapshot.generation)
        self.finish_reason = self._reason(token, eos_tokens)
        if self.ngrams is not None and not self.is_finished:
            self.ngrams.push(self.next_input)

    def _reason(self, token: int, eos_tokens: frozenset[int]) -> FinishReason | None:
        sampling = self.request.sampling
        if token in eos_tokens and not (sampling.ignore_eos or self.request.forced):
            return "stop"
        if token in sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.emitted) >= sampling.max_tokens else None
