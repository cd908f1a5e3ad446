"""Run ``offramp doctor``: what a machine lacks for offramp."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.markup import escape

from offramp.agents.drafting.likely_exits import LikelyExit, likely_exits
from offramp.controller.errors import OfframpError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import say
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec, load_engine

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "ray", "redis", "openai")


PARTS = 8
"""Exits are looked at on these parts of the depth."""

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
    found = likely_exits(engine, parts=PARTS)
    bars = "".join(
        f"\n  after {each.layer:3d} of {engine.stack.layers} "
        f"{'█' * round(each.agreement * 40):<40} {each.agreement:4.0%}  {each.rate:.2f} ×"
        for each in found
    )
    return (
        "tokens on which an exit agrees with full depth, and times full depth that fixed drafts "
        f"there are likely to decode{bars}\n{advice(found, model)}"
    )


def advice(exits: Sequence[LikelyExit], model: str) -> str:
    """Say in a sentence what such exits are good for.

    >>> fine = LikelyExit(layer=4, agreement=0.8, rate=1.3)
    >>> advice([fine, LikelyExit(layer=7, agreement=0.9, rate=1.1)], "m")
    'fine: `offramp train` can learn from these exits as they are'
    """
    early = exits[: max(1, len(exits) // 2)]
    if max(each.agreement for each in early) >= USEFUL:
        return "fine: `offramp train` can learn from these exits as they are"
    return (
        f"early exits of this model agree too seldom to pay: run `offramp tune --model {model}` "
        "before record and train, or draft on a copy (`offramp train --for drafting` does so, "
        "`offramp serve --draft-weights int4`)"
    )


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(doctor)


def doctor(model: options.Model = options.DEFAULT_MODEL) -> None:
    """Check what offramp needs on this machine, and say what is missing."""
    problems = 0
    for check in examine(model, Settings.from_environment()):
        mark = "[green]ok[/]  " if check.passed else "[red]fail[/]"
        say(f"{mark} {check.name}: {escape(check.detail)}")
        problems += not check.passed
    if problems:
        raise typer.Exit(1)
