"""What a worker process loads, keeps, and how it loads; what the loaded model says of itself."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from offramp.controller.errors import ConfigError
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """What workers keep of live traffic.

    Attributes:
        folder: Where each worker has a folder of its own, named as it is.
        most_mb: Most MiB of one worker's chunks; beyond it the oldest give way.
        time_share: Most of a worker's time that recording may take, in (0, 1).
        keep_text: Whether tokens stay what they are, prompts included; else only which of a
            position's tokens are equal is kept, and nothing of prompts.

    Raises:
        ConfigError: a number outside its range.
    """

    folder: Path
    most_mb: float = 64.0
    time_share: float = 0.02
    keep_text: bool = False

    def __post_init__(self) -> None:
        if not self.most_mb > 0:
            raise ConfigError("traffic_mb", f"{self.most_mb} is no room", "Give MiB")
        if not 0 < self.time_share < 1:
            raise ConfigError("traffic_share", f"{self.time_share} is not in (0, 1)")


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


def warm_up(engine: AdaptiveEngine) -> None:
    """Decode two tokens of nothing: else what has to be compiled is while the first client waits.

    On a machine that ran another version of these kernels, or none, that took 22 s (by hand, of
    the reference model).
    """
    engine.submit([0], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    while engine.load != (0, 0):
        engine.step()


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
        adapters: Exits with an adapter layer.
    """

    model: str
    tokenizer: str
    layers: int
    vocab: int
    context: int
    width: int
    translators: str = ""
    adapters: tuple[int, ...] = ()


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
        adapters=tuple(engine.decoder.translators.layers),
    )
