"""What the exactness tests share: policies, a driver, and full depth's opinion of a row.

Shape suffixes: T tokens, V vocabulary, N rows, F features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from offramp.controller.features import BoolArray, FloatArray
from offramp.worker import AdaptiveEngine, SamplingParams, TokenEvent
from offramp.worker.decoding.request import KVMode, Request
from offramp.worker.decoding.sequence import Sequence as Row
from support.models import LAYERS

RAGGED = [[5, 17, 33, 2, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [60, 3, 60]]
ALL_EXITS = tuple(range(1, LAYERS))
CLOSE = 1e-4
"""Two float32 logits at most so far apart may change places with the shape of a product."""


@dataclass
class RandomExit:
    """Leaves at random, so that every mixture of depths in a batch occurs."""

    chance: float
    seed: int = 0
    exits: tuple[int, ...] = ALL_EXITS
    schema: None = None
    candidates_VK: None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return self.rng.random(len(features_NF)) < self.chance


@dataclass
class ReplayedExits:
    """For one row alone: each token leaves where the same token left in another run."""

    depths: list[int]
    exits: tuple[int, ...] = ALL_EXITS
    schema: None = None
    candidates_VK: None = None
    token: int = 1  # the first one comes from the prompt
    asked: Iterator[int] = field(default_factory=lambda: iter(ALL_EXITS))

    def leave(self, features_NF: FloatArray) -> BoolArray:
        [_] = features_NF
        layer = next(self.asked)
        leaves = self.depths[self.token] == layer
        if leaves or layer == self.exits[-1]:
            self.token += 1
            self.asked = iter(self.exits)
        return np.array([leaves])


def drain(engine: AdaptiveEngine, requests: Sequence[Request]) -> list[Row]:
    """Step until all requests have ended; their rows, in order."""
    finished: dict[str, Row] = {}
    for _ in range(5000):
        if len(finished) == len(requests):
            return [finished[request.id] for request in requests]
        engine.step(finished)
    raise AssertionError(f"{len(requests) - len(finished)} requests never ended")


def decode(
    engine: AdaptiveEngine,
    prompts: list[list[int]],
    sampling: SamplingParams,
    policy: Any,
    kv_mode: KVMode = "project",
) -> list[Row]:
    """The finished rows of some prompts decoded together."""
    submit = engine.submit
    return drain(engine, [submit(p, sampling, policy, kv_mode=kv_mode) for p in prompts])


@torch.inference_mode()
def full_logits(model: Any, row: Row) -> torch.Tensor:
    """Hugging Face's logits before each emitted token, in one pass over the row, [T, V]."""
    first = len(row.request.prompt) - 1
    tokens = [*row.request.prompt, *row.emitted[:-1]]
    logits_TV: torch.Tensor = model(torch.tensor([tokens], device=model.device)).logits[0, first:]
    return logits_TV.float()


def shortfalls(model: Any, row: Row) -> torch.Tensor:
    """By how much each emitted token misses full depth's best logit there, [T].

    All 0 means, by induction over the tokens, that the row is full depth's greedy decoding.
    """
    logits_TV = full_logits(model, row)
    emitted_T = torch.tensor(row.emitted, device=logits_TV.device)
    return logits_TV.amax(-1) - logits_TV.gather(1, emitted_T[:, None])[:, 0]


def ends_right(row: Row, eos_tokens: frozenset[int]) -> bool:
    """Whether a row ended at its first end token, or at its length, and nowhere else."""
    *body, last = row.emitted
    if any(token in eos_tokens for token in body):
        return False
    if last in eos_tokens:
        return row.finish_reason == "stop"
    return row.finish_reason == "length" and len(row.emitted) == row.request.sampling.max_tokens


@contextmanager
def counted_tokens(engine: AdaptiveEngine) -> Iterator[Counter[int]]:
    """Counts, outside the engine, the tokens that each layer runs (padding included)."""
    counts: Counter[int] = Counter()

    def hook(index: int) -> Any:
        def count(_: Any, args: tuple[Any, ...], output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            counts[index] += hidden.shape[0] * hidden.shape[1]

        return count

    blocks: Any = engine.stack.blocks
    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(blocks)]
    yield counts
    for handle in handles:
        handle.remove()


def step_until_first_token(engine: AdaptiveEngine, finished: dict[str, Row]) -> list[TokenEvent]:
    """Read one prompt to its end; the events of that step."""
    for _ in range(1000):
        if events := engine.step(finished):
            return events
    raise AssertionError("no token came")
