"""Teacher-forced decoding: feed a document's own tokens, see what each exit would have emitted."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass

from offramp.controller.policy import ExitPolicy
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What came out along one document. The prompt's own token (full depth) is left out.

    Attributes:
        emitted: Tokens the engine would have emitted.
        expected: Tokens that really follow.
        exit_layers: Layers executed for each.
    """

    emitted: list[int]
    expected: list[int]
    exit_layers: list[int]


def follow(
    engine: AdaptiveEngine, documents: Items[Items[int]], prompt_tokens: int, policy: ExitPolicy
) -> tuple[list[Followed], float]:
    """Decode documents under a policy with the cache its exits leave behind.

    Unlike free generation, position i of every policy sees the same history of tokens, so
    policies can be compared token by token.

    Args:
        engine: Idle; its slots are the batch size.
        documents: Token ids, each longer than ``prompt_tokens`` + 1.
        prompt_tokens: Tokens of each document read at full depth first.
        policy: The policy.

    Returns:
        One entry per document, and the seconds of all decode steps. Steps that read a prompt
        are not timed: with more documents than slots, time only counts between admissions.
    """
    requests = [
        engine.submit(tokens[:prompt_tokens], policy=policy, forced=tokens[prompt_tokens:])
        for tokens in documents
    ]
    finished: dict[str, Sequence] = {}
    seconds = 0.0
    while len(finished) < len(requests):
        admits = engine.is_prefilling
        start = time.perf_counter()
        engine.step(finished)
        if not admits:
            seconds += time.perf_counter() - start
    return [_followed(finished[request.id]) for request in requests], seconds


def _followed(row: Sequence) -> Followed:
    return Followed(
        emitted=row.emitted[1:],
        expected=list(row.request.forced[1:]),
        exit_layers=row.exit_layers[1:],
    )
