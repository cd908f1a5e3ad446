"""Ray actors that hold an engine and record traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from offramp.controller.costs.table import CostTable
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceChunk
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig
from offramp.worker.recording.going_on import go_on
from offramp.worker.recording.recorder import record_document
from offramp.worker.spec import ModelFacts, WorkerSpec, describe, load_engine


class TraceRecorder:
    """Decodes documents at full depth and returns their per-exit features.

    Call ``prepare`` before ``record``.

    Args:
        spec: What to load.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.engine = load_engine(spec)
        self.exits: tuple[int, ...] = ()
        self.candidates_VK: IntArray = np.empty((0, 0), np.int32)
        self.states = False

    def describe(self) -> ModelFacts:
        """Tell the facts of the model."""
        return describe(self.engine)

    def prepare(self, exits: Sequence[int], candidates_VK: IntArray, states: bool = False) -> None:
        """Set the layers to probe, the candidate table, and whether hidden states are kept."""
        self.states = states
        self.exits = tuple(exits)
        self.candidates_VK = candidates_VK

    def record(self, document: str, tokens: Sequence[int], first: int = 0) -> TraceChunk:
        """One document's chunk, from a token on; see ``record_document``."""
        chunk = record_document(
            self.engine.stack,
            document,
            tokens,
            self.exits,
            self.candidates_VK,
            translators=self.engine.decoder.translators,
            states=self.states,
        )
        return chunk.after(first)

    def go_on(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> list[list[int]]:
        """What the model says after each prompt; see ``going_on.go_on``."""
        return go_on(self.engine, prompts, new_tokens, temperature, seeds=seeds)

    def measure(self, limit_s: float) -> CostTable:
        """This process's costs, in so many seconds once set up, while no other actor works."""
        config = ProfileConfig(
            rows=tuple(rows for rows in (1, 2, 4) if rows <= self.engine.kv.slots),
            context=min(ProfileConfig().context, self.engine.stack.context // 2),
            exits=self.exits,
            limit_s=limit_s,
        )
        return measure_costs(self.engine, self.candidates_VK, config).costs


TraceRecorderActor: Any = ray.remote(TraceRecorder)
"""The same as a Ray actor; each call is ``.remote(…)``."""
