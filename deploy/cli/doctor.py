"""Checks of a machine."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.controller.errors import OfframpError
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec, load_engine

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "ray", "redis", "openai")


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
    yield _try("model", lambda: _model(model))


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
