"""Run ``offramp demo``: the closed loop on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from offramp.deploy.cli import options
from offramp.deploy.demo.closed_loop import run_demo
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.deploy.serve.pool_config import LOOPBACK
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.serve_app import require_free
from offramp.deploy.serve.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(demo)


def demo(
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
    dtype: options.Dtype = "float32",
    draft_weights: options.DraftWeights = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 takes a free one.")] = 0,
    threads: options.SharedThreads = "auto",
    seed: options.Seed = 0,
) -> None:
    """Run the closed loop here: learn to draft, publish, hot-swap, query, roll back; then gates."""
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
    options.require_folder("out", out)
    if port:
        require_free(LOOPBACK[0], port)
    if settings.redis_url is not None:
        open_registry(settings).close()
    run_demo(config.shortened() if quick else config, settings)
