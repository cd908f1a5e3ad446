"""Teacher-forced decoding: feed a document's own tokens, see what each exit would emit.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import Request
from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine import AdaptiveEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What came out along one document. The prompt's own token (full depth) is left out.

    Attributes:
        emitted: Tokens the engine would have emitted.
        expected: Tokens that really follow.
        exit_layers: Layers executed for each.
        logprobs: Log-probability (natural) of each expected token at the layer where the token
            before it left the stack; empty if not asked for.
    """

    emitted: list[int]
    expected: list[int]
    exit_layers: list[int]
    logprobs: list[float] = field(default_factory=list)


class Witness(Sampler):
    """Emits the most likely token, and reports what the one really fed was given.

    Args:
        forced: Tokens that are fed in place of the emitted ones.
        vocab: Number V of tokens of the model.
    """

    def __init__(self, forced: Items[int], vocab: int) -> None:
        super().__init__(SamplingParams(logprobs=0), (), frozenset(), vocab)
        self._forced = forced

    def draw(self, logits_V: Tensor, emitted: Items[int]) -> Draw:
        """The argmax, with the log-probability of the forced token in its place."""
        logprobs_V = logits_V.float().log_softmax(-1)
        return Draw(int(logits_V.argmax()), float(logprobs_V[self._forced[len(emitted)]]))


def follow(
    engine: AdaptiveEngine,
    documents: Items[Items[int]],
    prompt_tokens: int,
    policy: Policy,
    *,
    with_logprobs: bool = False,
) -> tuple[list[Followed], float]:
    """Decode documents under a policy with the cache its exits leave behind.

    Unlike free generation, position i of every policy sees the same history of tokens, so
    policies can be compared token by token.

    Args:
        engine: Idle; its slots are the batch size.
        documents: Token ids, each longer than ``prompt_tokens`` + 1.
        prompt_tokens: Tokens of each document read at full depth first.
        policy: Policy that the document is decoded under.
        with_logprobs: Report the log-probabilities of the documents' tokens. It takes time, so
            not where time is measured.

    Returns:
        One entry per document, and the seconds of all decode steps. Steps that read a prompt
        are not timed: with more documents than slots, time only counts between admissions.
    """
    requests = [
        engine.submit(
            tokens[:prompt_tokens],
            policy=policy,
            forced=tokens[prompt_tokens:],
            sampler=Witness(tokens[prompt_tokens:], engine.stack.vocab) if with_logprobs else None,
        )
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


def submit_scored(
    engine: AdaptiveEngine,
    prompt: Items[int],
    following: Items[int],
    prefill: Prefill | None = None,
) -> Request:
    """Queue a prompt whose own next tokens are fed at full depth, each with its log-probability.

    Args:
        engine: Reads the prompt.
        prompt: Token ids.
        following: Tokens that really follow, at least one.
        prefill: How the prompt is read; the engine's own way by default.

    Raises:
        RequestError: as ``submit`` does.
    """
    witness = Witness(following, engine.stack.vocab)
    return engine.submit(
        prompt, policy=NeverExit(), prefill=prefill, forced=following, sampler=witness
    )


def nats_per_token(row: Sequence) -> float:
    """Mean loss of what followed a prompt of ``submit_scored``, once the row is finished."""
    return -float(np.mean([logprob for logprob in row.logprobs if logprob is not None]))


def _followed(row: Sequence) -> Followed:
    return Followed(
        emitted=row.emitted[1:],
        expected=list(row.request.forced[1:]),
        exit_layers=row.exit_layers[1:],
        logprobs=[logprob for logprob in row.logprobs[1:] if logprob is not None],
    )
