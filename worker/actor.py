"""Ray actors that hold an engine and record traces."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from transformers.utils import logging as transformers_logging

from offramp.controller.costs import CostTable
from offramp.controller.features import IntArray
from offramp.controller.traces import TraceChunk
from offramp.worker.config import EngineConfig
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig
from offramp.worker.record import record_document

RECORD_S = 20.0
"""Seconds after which a recording stops measuring costs; `offramp profile` takes more care."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker process loads.

    Attributes:
        model: Folder in Hugging Face format, as the worker's machine sees it.
        dtype: "float32" or "bfloat16".
        device: "cpu" or "cuda".
        threads: Torch threads of the process.
        slots: Rows decoded together at most.
        engine: How the rows share the machine; its folder as the worker's machine sees it.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    slots: int = 8
    engine: EngineConfig = field(default_factory=EngineConfig)


def load_engine(spec: WorkerSpec) -> AdaptiveEngine:
    """Set the process's threads and load the engine.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: a setting, or the translators, do not fit it.
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(spec.threads)
    return AdaptiveEngine.from_pretrained(
        spec.model, dtype=spec.dtype, device=spec.device, slots=spec.slots, config=spec.engine
    )


def freeze_heap() -> None:
    """Exempt what lives now from cyclic garbage collection, for a process that only serves.

    A full collection looks at every object, some half a million once torch and transformers are
    loaded: 0.2 s, in the middle of some token (timed by hand on the machine of docs/decoding.md).
    """
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a loaded model says of itself.

    Attributes:
        model: Fingerprint of the weights.
        tokenizer: Fingerprint of the vocabulary.
        layers: Number of layers L.
        vocab: Number of tokens V.
        context: Most tokens of a sequence.
        width: Columns D of its hidden state.
        translators: Digest of the translators its exits are read through; "" for none.
    """

    model: str
    tokenizer: str
    layers: int
    vocab: int
    context: int
    width: int
    translators: str = ""


def describe(engine: AdaptiveEngine) -> ModelFacts:
    """The facts of an engine's model."""
    return ModelFacts(
        model=engine.model_fingerprint,
        tokenizer=engine.tokenizer_fingerprint,
        layers=engine.stack.layers,
        vocab=engine.stack.vocab,
        context=engine.stack.context,
        width=engine.stack.width,
        translators=engine.decoder.translators.digest,
    )


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
        """The model's facts."""
        return describe(self.engine)

    def prepare(self, exits: Sequence[int], candidates_VK: IntArray, states: bool = False) -> None:
        """Set the layers to probe, the candidate table, and whether hidden states are kept."""
        self.states = states
        self.exits = tuple(exits)
        self.candidates_VK = candidates_VK

    def record(self, document: str, tokens: Sequence[int]) -> TraceChunk:
        """One document's chunk; see ``record_document``."""
        return record_document(
            self.engine.stack,
            document,
            tokens,
            self.exits,
            self.candidates_VK,
            translators=self.engine.decoder.translators,
            states=self.states,
        )

    def measure(self) -> CostTable:
        """This process's costs, in half a minute; call it while no other actor works."""
        config = ProfileConfig(
            rows=tuple(rows for rows in (1, 2, 4) if rows <= self.engine.kv.slots),
            context=min(ProfileConfig().context, self.engine.stack.context // 2),
            exits=self.exits,
            limit_s=RECORD_S,
        )
        return measure_costs(self.engine, self.candidates_VK, config).costs


TraceRecorderActor: Any = ray.remote(TraceRecorder)
"""The same as a Ray actor; each call is ``.remote(…)``."""
