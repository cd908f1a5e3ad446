"""Run ``offramp demo``: the closed loop on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.classifying import CLASSIFY
from offramp.deploy.demo.closed_loop import run_classification, run_demo
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.deploy.serve.pool_config import LOOPBACK
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.serve_app import require_free
from offramp.deploy.serve.settings import Settings

OF_THE_LAST_ACT = {"model", "out", "quick", "task", "dtype", "threads", "seed"}
"""Options that mean something to it alone."""

ALL = "all"
"""What ``offramp demo`` shows unless told otherwise."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(demo)


def demo(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for the report; emptied first.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[
        bool, typer.Option(help="Fewer documents and steps: shows the loop, not the numbers.")
    ] = False,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="End after the part that loses nothing.")
    ] = False,
    task: Annotated[
        str, typer.Option(help="all, or classify: only the last act, texts that leave early.")
    ] = ALL,
    dtype: options.Dtype = "float32",
    draft_weights: options.DraftWeights = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")] = 0,
    threads: options.SharedThreads = "auto",
    seed: options.Seed = 0,
) -> None:
    """Run the closed loop: learn to draft, publish, hot-swap, query, roll back; gates; texts."""
    if task not in (ALL, CLASSIFY):
        raise ConfigError("task", f"{task!r} is unknown", f"Use {ALL} or {CLASSIFY}")
    settings = Settings.from_environment()
    config = DemoConfig(
        model=model,
        dtype=dtype,
        draft_weights=draft_weights,
        is_lossless=lossless,
        out=out,
        port=port,
        seed=seed,
    )
    config = replace(config, threads=options.parse_threads(threads, config.replicas))
    config = config.shortened() if quick else config
    options.require_folder("out", out)
    if task == CLASSIFY:
        options.require_meant(context, OF_THE_LAST_ACT, f"means nothing to --task {CLASSIFY}")
        run_classification(config)
        return
    if port:
        require_free(LOOPBACK[0], port)
    if settings.redis_url is not None:
        open_registry(settings).close()
    run_demo(config, settings)
