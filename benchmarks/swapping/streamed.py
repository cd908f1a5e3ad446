"""Requests as clients stream them, and what each gives when it is decoded again, alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from offramp.controller.errors import OfframpError
from offramp.controller.policies.protocols import Policy
from offramp.worker.decoding.request import KVMode, PolicySnapshot
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.service import EngineService


@dataclass(slots=True, kw_only=True)
class StreamedRequest:
    """What one request got.

    Attributes:
        prompt: Its token ids.
        generation: The release that it was pinned to; −1 if it was never admitted.
        digest: That of the release's weights.
        kv_mode: What became of layers that it skipped; ``defer`` if it was audited.
        tokens: What it emitted.
        generations: Releases that its tokens say decided them.
        asked: When it was asked, seconds of the monotonic clock.
        stamps: When each token came, by the same clock.
        error: Why it failed; "" if it did not.
    """

    prompt: tuple[int, ...]
    generation: int = -1
    digest: str = ""
    kv_mode: KVMode = "project"
    tokens: list[int] = field(default_factory=list)
    generations: set[int] = field(default_factory=set)
    asked: float = 0.0
    stamps: list[float] = field(default_factory=list)
    error: str = ""


async def stream(
    service: EngineService, prompt: tuple[int, ...], sampling: SamplingParams
) -> StreamedRequest:
    """Ask, and read the answer to its end or to its error."""
    record = StreamedRequest(prompt=prompt, asked=time.monotonic())
    try:
        request, events = await service.submit(prompt, sampling)
        snapshot, record.kv_mode = request.snapshot, request.kv_mode
        record.generation, record.digest = snapshot.generation, snapshot.digest
        async for event in events:
            record.stamps.append(time.monotonic())
            record.tokens.append(event.token)
            record.generations.add(event.generation)
    except OfframpError as error:
        record.error = repr(error)
    return record


def replay(
    engine: AdaptiveEngine,
    prompt: tuple[int, ...],
    policy: Policy | PolicySnapshot,
    kv_mode: KVMode,
    sampling: SamplingParams,
) -> Sequence:
    """What a request does that has an idle engine, and one policy, to itself."""
    finished: dict[str, Sequence] = {}
    with torch.inference_mode():
        request = engine.submit(list(prompt), sampling, policy, kv_mode=kv_mode)
        while not engine.is_idle:
            engine.step(finished)
    return finished[request.id]
