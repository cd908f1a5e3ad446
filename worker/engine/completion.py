"""Completions: what ``generate`` returns."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from offramp.worker.decoding.request import (
    CompletionStats,
    FinishReason,
    Request,
    TokenEvent,
    TopLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What ``generate`` returns per prompt.

    Attributes:
        text: Decoded tokens, special ones left out; up to a stop string. With echo, behind the
            prompt's text.
        token_ids: Emitted tokens, the one that ended it included.
        exit_layers: Layers executed for each of them.
        finish_reason: "stop" at an end-of-sequence token, a stop token or a stop string, "length"
            at max_tokens.
        stats: What it cost.
        index: Which of the prompt's ``n`` completions, from 0.
        logprobs: Log-probability of each token at the layer it left from, under the logits as the
            model gave them; None if not asked for.
        top_logprobs: Per token, the most likely tokens there, best first; None if not asked for.
    """

    text: str
    token_ids: list[int]
    exit_layers: list[int]
    finish_reason: FinishReason
    stats: CompletionStats
    index: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None


def mean_layer(exit_layers: Items[int]) -> float:
    """Mean of the layers executed; 0 for no tokens."""
    return sum(exit_layers) / len(exit_layers) if exit_layers else 0.0


def completion_of(
    request: Request, events: Items[TokenEvent], *, index: int = 0, prefix: str = ""
) -> Completion:
    """The completion of a request whose events have all come.

    Args:
        request: Request that was answered.
        events: Events of all its tokens, in order.
        index: Which of the prompt's completions it is.
        prefix: What its text is put behind.
    """
    layers = [event.exit_layer for event in events]
    finish_reason, stats = events[-1].finish_reason, events[-1].stats
    assert finish_reason is not None
    assert stats is not None
    reports = request.sampling.logprobs is not None
    return Completion(
        text=prefix + "".join(event.text for event in events),
        token_ids=[event.token for event in events],
        exit_layers=layers,
        finish_reason=finish_reason,
        stats=stats,
        index=index,
        logprobs=[e.logprob for e in events if e.logprob is not None] if reports else None,
        top_logprobs=[e.top_logprobs for e in events] if reports else None,
    )
