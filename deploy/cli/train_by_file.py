"""Run ``offramp train --config``: all settings from a file, one run or one per seed."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from offramp.agents.training.families import ON_POLICY
from offramp.agents.training.sweep import sweep
from offramp.agents.training.train import complete, open_run
from offramp.agents.training.train_config import TrainConfig, load_config
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, progress
from offramp.deploy.serve.serve_app import ray_session
from offramp.deploy.serve.settings import Settings

REACH_S = 3.0
"""Seconds that a cluster's address has to answer; Ray itself tries for a minute."""


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
