"""Measure what each feature schema's probe costs on this machine, in seconds and in layers.

Shape suffixes: N rows, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import SCHEMAS, IntArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.request import FULL_DEPTH
from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.model.attention import decode_window
from offramp.worker.probes import FusedProbe, Probe, ProbeFactory
from offramp.worker.probes.candidates.successors import NgramIndex
from offramp.worker.profiling.samples import random_policy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProbeCost:
    """Medians at batch 1.

    Attributes:
        warm_s: One probe right after itself.
        probe_s: One probe between two layers, where the caches hold neither its code nor its data.
        build_s: Building it at the start of a token, candidates and gather included.
        decide_s: One guarded decision of the policy, likewise between layers.
        ask_s: One question as the engine asks it of one row: probe and decision, in one compiled
            call where there is one.
        token_s: A token's build, and its questions at every exit.
        share: ``token_s`` in the time of a full-depth pass with its head.
        layers: One question, in layers.
    """

    warm_s: float
    probe_s: float
    build_s: float
    decide_s: float
    ask_s: float
    token_s: float
    share: float
    layers: float


@torch.inference_mode()
def probe_costs(
    engine: AdaptiveEngine,
    candidates_VK: IntArray,
    *,
    exits: tuple[int, ...] = (),
    context: int = 128,
    repeats: int = 31,
) -> dict[str, ProbeCost]:
    """What every schema costs at batch 1, by schema name.

    Args:
        engine: An idle engine; its model, dtype and thread count are what is measured.
        candidates_VK: A candidate table for the probes that need one.
        exits: Layers to probe after, ascending; by default at a quarter, half and three quarters.
        context: Tokens already in the cache.
        repeats: Passes per schema, taken in turn; the medians count.
    """
    layers = engine.stack.layers
    chosen = exits or tuple(sorted({max(1, layers * n // 4) for n in (1, 2, 3)}))
    prompt = tuple(index % engine.stack.vocab for index in range(context))
    prefilled_row(engine, prompt)
    bench = ProbeFactory(engine.stack)
    walks = {}
    for schema in SCHEMAS.values():
        policy = random_policy(schema, chosen, candidates_VK)
        policy.threshold = math.inf
        walks[schema.name] = _Walk(engine, bench, policy, prompt)
    for _ in range(repeats + 1):  # the first pass of each only warms up
        for walk in walks.values():
            walk.run()
    return {name: walk.cost() for name, walk in walks.items()}


@dataclass(slots=True)
class _Walk:
    """Full-depth passes of one token that are asked, at each exit, and never leave."""

    engine: AdaptiveEngine
    bench: ProbeFactory
    policy: MlpPolicy
    prompt: tuple[int, ...]
    passes: int = 0
    guard: PolicyGuard = field(default_factory=PolicyGuard)
    ngrams: NgramIndex = field(init=False)
    fused: FusedProbe | None = field(init=False)
    times: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ngrams = NgramIndex(self.prompt)
        self.fused = self.bench.fused_probe(self.policy, 1)

    def run(self) -> None:
        """Probe once at every exit."""
        self.passes += 1
        stack, position = self.engine.stack, len(self.prompt)
        position_11 = torch.tensor([[position]], device=stack.device)
        x_11D = stack.embed(torch.tensor([[self.prompt[-1]]], device=stack.device), position_11)
        rotary = stack.rotary(x_11D, position_11)
        window = decode_window([0], [position], stack.heads_per_key, x_11D)
        self.engine.kv.open(window)
        probe = self._timed("build", self._probe, x_11D[:, 0], position)
        for layer in range(1, stack.layers + 1):
            arguments = (layer - 1, x_11D, rotary, window, self.engine.kv)
            x_11D = self._timed("layer", stack.run_layer, *arguments)
            if layer in self.policy.exits:
                self._ask(probe, layer, x_11D[:, 0])
        self._timed("head", lambda: stack.logits(x_11D[:, 0]).argmax().item())

    def _probe(self, x_1D: Tensor, position: int) -> Probe:
        if self.fused is not None:
            self.fused.begin([self.ngrams], [()], x_1D, [position])
            return self.fused
        return self.bench.probe(self.policy, [self.ngrams], x_1D, np.asarray([position], np.int32))

    def _ask(self, probe: Probe, layer: int, x_1D: Tensor) -> None:
        # In turn, since what is asked first drives the other's code into the caches.
        if isinstance(probe, FusedProbe) and self.passes % 2:
            self._timed("ask", probe.leaving, layer, x_1D)
            return
        features_NF = self._timed("probe", probe.features, layer, x_1D)
        self._timed("decide", self.guard.decide, self.policy, features_NF)
        self._timed("warm", probe.features, layer, x_1D)

    def cost(self) -> ProbeCost:
        """Medians of all passes but the first."""
        middle = {name: median(self._after_first(name)) for name in self.times}
        one = middle.get("ask", middle["probe"] + middle["decide"])
        token = middle["build"] + len(self.policy.exits) * one
        whole = self.engine.stack.layers * middle["layer"] + middle["head"]
        return ProbeCost(
            warm_s=middle["warm"],
            probe_s=middle["probe"],
            build_s=middle["build"],
            decide_s=middle["decide"],
            ask_s=one,
            token_s=token,
            share=token / whole,
            layers=one / middle["layer"],
        )

    def _after_first(self, part: str) -> list[float]:
        times = self.times[part]
        return times[min(len(times) // self.passes, len(times) - 1) :]

    def _timed(self, part: str, action: Callable[..., T], *arguments: Any) -> T:
        start = time.perf_counter()
        result = action(*arguments)
        self.times.setdefault(part, []).append(time.perf_counter() - start)
        return result


def prefilled_row(engine: AdaptiveEngine, prompt: tuple[int, ...]) -> Sequence:
    """A row at full depth that has read its prompt and always feeds the same next token."""
    request = engine.submit(prompt, SamplingParams(max_tokens=2), FULL_DEPTH)
    engine.cancel(request.id)
    row = Sequence(request, 0, Sampler(request.sampling, prompt, frozenset(), engine.stack.vocab))
    engine.kv.reserve(len(prompt) + 1)
    engine.decoder.prefill(row, len(prompt))
    row.emit(Draw(prompt[0]), engine.stack.layers, frozenset())
    return row
