"""Run ``offramp train``: which options mean what, and what is taught by them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.training.families import ON_POLICY
from offramp.agents.training.sweep import sweep
from offramp.agents.training.train import complete, open_run
from offramp.agents.training.train_config import GATE_FAMILIES, TrainConfig, load_config
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.classifying import CLASSIFY, Data, Heads, teach_classes
from offramp.deploy.cli.console import console, progress
from offramp.deploy.cli.drafting import teach
from offramp.deploy.cli.prompting import PROMPTS, WEIGHT, Steps, Weight, teach_prompts_here
from offramp.deploy.serve.serve_app import ray_session
from offramp.deploy.serve.settings import Settings

Goal = Annotated[
    str,
    typer.Option("--for", help="What is taught: exits, drafting (lossless), prompts or classify."),
]
DraftModel = Annotated[str, typer.Option(help="Not with --for exits: folder of the model.")]
DraftDtype = Annotated[
    str, typer.Option(help="Not with --for exits: weights' dtype.", show_default="float32")
]
DraftTemperature = Annotated[
    float, typer.Option(help="With --for drafting: of the model's own text, which is recorded.")
]
Insight = Annotated[
    bool,
    typer.Option(
        "--insight", help="With --for drafting: drafters also read states, and the token before."
    ),
]
Targets = Annotated[
    str, typer.Option(help="Offline agreements at which to place policies, like .92,.96.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="With --config, or for prompts: go on from --out's checkpoint."),
]
Seeds = Annotated[
    str,
    typer.Option(
        help="With --config: one run per seed, like 0,1,2, as Ray tasks. For prompts: one policy "
        "per seed."
    ),
]
Cluster = Annotated[
    str | None, typer.Option(help="With --config: cluster to join.", show_default="RAY_ADDRESS")
]

STEPS = 1_500_000
"""PPO's steps where nobody says; a lesson on prompts has a default of its own."""

EXITS, DRAFTING = "exits", "drafting"
"""What ``offramp train --for`` calls exits from recorded traces, and drafters."""

_ALWAYS = {"out", "goal"}
_TAUGHT = _ALWAYS | {"steps", "threads", "seed"}
_BY_READING = _TAUGHT | {"model", "corpus", "translators", "dtype", "exits"}

MEANT = {
    EXITS: _TAUGHT | {"traces", "targets", "costs", "translators"},
    DRAFTING: _BY_READING | {"temperature", "insight"},
    PROMPTS: _BY_READING | {"weight", "seeds", "resume"},
    CLASSIFY: _TAUGHT | {"model", "dtype", "heads", "data"},
}
"""The options of ``offramp train`` that mean something, by what is taught."""

MEANT_BY_FILE = {
    EXITS: _ALWAYS | {"config", "traces", "resume", "seeds", "ray_address"},
    DRAFTING: _ALWAYS | {"config"},
    PROMPTS: _ALWAYS | {"config", "resume"},
}
"""Those beside a file of settings."""

OF_OTHERS = {"heads": CLASSIFY, "data": CLASSIFY, "weight": PROMPTS, "insight": DRAFTING}
"""Goals that options which mean nothing to exits are of."""

REACH_S = 3.0
"""Seconds that a cluster's address has to answer; Ray itself tries for a minute."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("train")(train_policies)


def train_policies(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="New folder for the trained policies.")],
    goal: Goal = EXITS,
    heads: Heads = None,
    data: Data = None,
    traces: Annotated[Path | None, typer.Option(help="Folder that `offramp record` wrote.")] = None,
    model: DraftModel = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    translators: options.Translators = None,
    dtype: DraftDtype = "",
    exits: options.DraftExits = "",
    temperature: DraftTemperature = 0.0,
    insight: Insight = False,
    weight: Weight = WEIGHT,
    steps: Steps = None,
    targets: Targets = ".92,.95,.97,.985",
    costs: options.Costs = None,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with more settings; see docs/training.md.")
    ] = None,
    resume: Resume = False,
    seeds: Seeds = "",
    ray_address: Cluster = None,
) -> None:
    """Teach policies when to leave, from recorded traces; or when to draft and when to verify."""
    asked = locals()
    _require_meant(context, goal, by_file=config is not None)
    if goal == PROMPTS:
        teach_prompts_here(asked, out)
        return
    steps = asked["steps"] = STEPS if steps is None else steps
    if goal == DRAFTING:
        teach(config, _lesson(asked), steps, out)
        return
    if goal == CLASSIFY:
        teach_classes(asked, out)
        return
    if config is not None:
        train_by_file(config, traces, out, resume=resume, seeds=seeds, ray_address=ray_address)
        return
    if traces is None:
        raise ConfigError("traces", "is not given", "Name the folder, or give --config")
    options.require_new_folder("out", out)
    placed_at = options.parse_list("targets", targets, float, "numbers", ".9,.97")
    train_here(_gates(traces, costs, translators, placed_at, steps, (threads, seed)), out)


def _require_meant(context: typer.Context, goal: str, *, by_file: bool) -> None:
    """Refuse what was typed and means nothing to what is taught.

    Raises:
        ConfigError: naming it, or a goal that is unknown.
    """
    if goal not in MEANT:
        raise ConfigError(
            "for", f"{goal!r} is unknown", f"Use {EXITS}, {DRAFTING}, {PROMPTS} or {CLASSIFY}"
        )
    typed = options.options_typed(context)
    if goal == EXITS:
        for name in sorted(typed.keys() & OF_OTHERS.keys()):
            options.require_unused({name: True}, f"means nothing without --for {OF_OTHERS[name]}")
        recorded = {name: name in typed for name in sorted(_BY_READING - MEANT[EXITS])}
        options.require_unused(
            recorded | {"temperature": "temperature" in typed}, "is that of the recording"
        )
    if by_file and goal in MEANT_BY_FILE:
        alone = typed.keys() - MEANT_BY_FILE[goal]
        odd = {name: name not in MEANT[goal] for name in sorted(alone)}
        options.require_unused(odd, f"does not go with --for {goal}")
        options.require_unused(dict.fromkeys(sorted(alone), True), "is a setting of the file")
        return
    if goal == EXITS and typed.keys() & {"resume", "seeds", "ray_address"}:
        raise ConfigError("config", "is not given, and --resume, --seeds and --ray-address need it")
    options.require_meant(context, MEANT[goal], f"does not go with --for {goal}")


def _lesson(asked: Mapping[str, Any]) -> DraftingConfig:
    """How drafting is taught, from the options of the command."""
    same = {name: asked[name] for name in ("model", "threads", "seed", "temperature", "insight")}
    return DraftingConfig(
        **same,
        corpus=str(asked["corpus"] or ""),
        translators=str(asked["translators"] or ""),
        dtype=asked["dtype"] or "float32",
        exits=options.parse_exits("exits", asked["exits"]),
    )


def train_by_file(
    path: Path,
    traces: Path | None,
    out: Path,
    *,
    resume: bool = False,
    seeds: str = "",
    ray_address: str | None = None,
) -> None:
    """Run what a TOML file says.

    Args:
        path: A TOML file.
        traces: Replaces the file's.
        out: Folder of checkpoints, scalars and policies.
        resume: Go on from its checkpoint.
        seeds: One run for each; "" runs the file's seed, here.
        ray_address: Cluster to join; None takes RAY_ADDRESS, or starts a local one.

    Raises:
        ConfigError: an option is unusable, or nobody answers at the address.
        TraceError: the traces are missing or damaged.
    """
    config = load_config(path, TrainConfig)
    config = config if traces is None else replace(config, traces=str(traces))
    address = ray_address or Settings.from_environment().ray_address
    numbers = options.parse_list("seeds", seeds, int, "seeds", "0,1")
    if any(number < 0 for number in numbers):
        raise ConfigError("seeds", f"{seeds!r} holds a negative one", "Write it like 0,1")
    if not resume:
        options.require_new_folder("out", out)
    rounds = config.onpolicy.rounds if ON_POLICY in config.families else 0
    needs_ray = bool(numbers) or rounds > 0
    if needs_ray:
        require_reachable(address)
    cpus = max(config.onpolicy.collectors, os.cpu_count() or 1)
    session = ray_session(address, cpus) if needs_ray else contextlib.nullcontext()
    with session:
        if numbers:
            with progress("seeds", "runs") as advance:
                sweep(config, numbers, out.resolve(), advance)
            console.print(f"{len(numbers)} runs → {out}")
            return
        train_here(config, out, resume=resume)


def train_here(config: TrainConfig, out: Path, *, resume: bool = False) -> None:
    """Train in this process, and show how far it is.

    Raises:
        ConfigError, TraceError: as ``train``.
    """
    with progress("train", "steps") as advance:
        run = open_run(
            config,
            out,
            resume=resume,
            on_progress=lambda stage, done, total: advance(done, total, stage),
        )
        if run.is_finished:
            console.print("this run is finished: nothing is trained again")
        contenders = complete(run, out)
    console.print(f"{len(contenders)} policies → {out}")


def require_reachable(address: str | None) -> None:
    """Refuse a cluster's address at which nobody answers.

    Raises:
        ConfigError: naming it.
    """
    if address is None or address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((parts.hostname, parts.port or 6379), timeout=REACH_S):
            return
    except (OSError, ValueError) as error:
        raise ConfigError(
            "ray_address",
            f"nobody answers at {address!r} ({error})",
            "Start a cluster there (`ray start --head`), or unset RAY_ADDRESS for a local one",
        ) from error


def _gates(
    traces: Path,
    costs: Path | None,
    translators: Path | None,
    targets: tuple[float, ...],
    steps: int,
    machine: tuple[int, int],
) -> TrainConfig:
    """Settings of the command line; ``machine`` is threads and seed."""
    if steps < 1:
        raise ConfigError("steps", f"{steps} is below 1", "Use 1 or more")
    threads, seed = machine
    return TrainConfig(
        traces=str(traces),
        costs=str(costs or ""),
        translators=str(translators or ""),
        families=GATE_FAMILIES,
        seed=seed,
        threads=threads,
        targets=targets,
        gate=PPOConfig(steps=steps),
    )
