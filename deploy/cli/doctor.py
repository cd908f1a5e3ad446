"""Checks of a machine."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.tuning.quality import measure, summarise
from offramp.controller.errors import OfframpError
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.model.translators import UNTRANSLATED
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec, load_engine

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "ray", "redis", "openai")


LOOKED_AT = 4
"""Documents of the standard library that exits are looked at on."""

WINDOW = 128
"""Tokens of each."""

USEFUL = 0.4
"""Agreement below which an exit in the first half of the depth proposes mostly wrong tokens."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: its name, whether it is fine, and what was found."""

    name: str
    passed: bool
    detail: str


def examine(model: str, settings: Settings) -> Iterator[Check]:
    """Look at Python, packages, Redis and the model, one after the other."""
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0])
    for package in PACKAGES:
        yield _try(package, lambda name=package: importlib.metadata.version(name))  # type: ignore[misc]  # a default argument
    yield Check("machine", True, describe_machine(torch.float32))
    yield _try("redis", lambda: _redis(settings))
    loaded = _try("model", lambda: _model(model))
    yield loaded
    if loaded.passed:
        yield _try("exits", lambda: _exits(model))


def _try(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, True, look())
    except (OfframpError, OSError, importlib.metadata.PackageNotFoundError) as error:
        return Check(name, False, str(error))


def _redis(settings: Settings) -> str:
    if settings.redis_url is not None:
        open_registry(settings).close()
        return "REDIS_URL answers"
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as redis:
        open_registry(settings.model_copy(update={"redis_url": redis.url})).close()
    return "the embedded server starts"


def _model(model: str) -> str:
    engine = load_engine(WorkerSpec(model=model))
    completion = engine.generate([[0]], SamplingParams(max_tokens=2))[0]
    return f"{model} decodes ({engine.stack.layers} layers, tokens {completion.token_ids})"


def _exits(model: str) -> str:
    """Agreement of each exit with full depth as a picture, and what to do about it."""
    engine = load_engine(WorkerSpec(model=model))
    if engine.tokenizer is None:
        return "not looked at: the model has no tokenizer"
    found = agreement_by_layer(engine)
    bars = "".join(
        f"\n  after {layer:3d} of {engine.stack.layers} {'█' * round(share * 40):<40} {share:.0%}"
        for layer, share in found.items()
    )
    return f"tokens on which an exit agrees with full depth{bars}\n{advice(found, model)}"


def agreement_by_layer(engine: AdaptiveEngine) -> dict[int, float]:
    """Share of a few hundred tokens on which the model's own head agrees early, by layer."""
    layers = engine.stack.layers
    exits = sorted({max(1, layers * part // 8) for part in range(1, 8)} | {layers - 1})
    texts = load_corpus(None)[:LOOKED_AT]
    tokens = (engine.tokenizer(each.text, verbose=False)["input_ids"] for each in texts)
    windows = [each[: WINDOW + 1] for each in tokens]
    sums = measure(engine.stack, UNTRANSLATED, windows, exits)
    total = sum(len(each) - 1 for each in windows)
    return {row.layer: row.agreement for row in summarise(sums, total) if row.layer < layers}


def advice(agreement: Mapping[int, float], model: str) -> str:
    """Say in a sentence what exits that agree so often are good for.

    >>> advice({2: 0.7, 4: 0.8}, "m")
    'fine: `offramp train` can learn from these exits as they are'
    """
    early = list(agreement.values())[: max(1, len(agreement) // 2)]
    if max(early) >= USEFUL:
        return "fine: `offramp train` can learn from these exits as they are"
    return (
        f"early exits of this model agree too seldom to pay: run `offramp tune --model {model}` "
        "before record and train, or draft on a copy (`offramp serve --draft-weights int8`)"
    )
