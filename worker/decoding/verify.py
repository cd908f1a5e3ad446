"""Lossless drafts: what full depth says of tokens that left early.

Shape suffixes: M tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from offramp.worker.decoding.sequence import Draft


def accepted_greedily(drafts: Sequence[Draft], full_tokens: Sequence[int]) -> int:
    """How many drafts full depth would have emitted, up to the first that it would not."""
    for count, (draft, token) in enumerate(zip(drafts, full_tokens, strict=False)):
        if draft.token != token:
            return count
    return len(drafts)


def is_accepted(draft: Draft, chances_V: Tensor, chance: float) -> bool:
    """Keep a sampled draft with probability min(1, p/q) (Leviathan et al. 2023, section 2.3).

    Args:
        draft: Drawn from q.
        chances_V: p, the distribution at full depth.
        chance: Drawn evenly from [0, 1).
    """
    assert draft.chances_V is not None  # sampled drafts carry their distribution
    p = float(chances_V[draft.token])
    q = float(draft.chances_V[draft.token])
    return chance * q < p


def residual(draft: Draft, chances_V: Tensor) -> Tensor:
    """Distribution of the token that replaces a rejected draft: max(0, p − q), normalised."""
    assert draft.chances_V is not None
    rest_V = (chances_V - draft.chances_V).clamp(min=0)
    total = rest_V.sum()
    # p = q up to rounding leaves nothing; then p itself is right.
    return rest_V / total if total > 0 else chances_V
