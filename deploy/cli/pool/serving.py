"""Run ``offramp serve``: a pool of workers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.controller.errors import FieldError, OfframpError
from offramp.controller.keys.root import load_root
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console
from offramp.deploy.cli.pool import pool_options
from offramp.deploy.cli.pool.pool_configs import config_of, models_to_serve, require_servable
from offramp.deploy.cli.pool.pool_signals import REDEPLOY, catch_signals
from offramp.deploy.cli.releases.channel_option import Channel
from offramp.deploy.http.limits import DEFAULT_LIMITS
from offramp.deploy.serve.log_lines import send_lines, show_line
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.publishing import open_registry, public_key_path
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.serve_app import ray_session, require_free, running_pool
from offramp.deploy.serve.settings import Settings

_logger = logging.getLogger(__name__)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(_failing_as_it_logs(serve))


def _failing_as_it_logs(command: Callable[..., None]) -> Callable[..., None]:
    """Have what a command logs written, and, if that is JSON, also why it cannot do its work."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        send_lines(given["log_format"], "command", show_line)
        try:
            command(**given)
        except (OfframpError, OSError) as error:
            if given["log_format"] != "json":
                raise
            fields = {"field": error.field} if isinstance(error, FieldError) else {}
            _logger.error("%s", error, extra={"fields": fields})
            raise typer.Exit(1) from error

    return run


def serve(
    context: typer.Context,
    models: pool_options.Models = None,
    model: options.Model = options.DEFAULT_MODEL,
    served_model_name: pool_options.ServedName = None,
    classify: pool_options.Classify = None,
    replicas: pool_options.Replicas = 2,
    max_replicas: pool_options.MaxReplicas = None,
    target_requests: pool_options.TargetRequests = None,
    target_tokens: pool_options.TargetTokens = None,
    grow_after: pool_options.GrowAfter = pool_options.GROW_AFTER_S,
    shrink_after: pool_options.ShrinkAfter = pool_options.SHRINK_AFTER_S,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    redis_port: pool_options.RedisPort = 6390,
    slots: Annotated[int, typer.Option(min=1, help="Rows decoded together per worker.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Waiting requests per worker.")] = 64,
    max_body_bytes: pool_options.MaxBodyBytes = DEFAULT_LIMITS.body_bytes,
    max_choices: pool_options.MaxChoices = DEFAULT_LIMITS.choices,
    deadline: pool_options.Deadline = DEFAULT_LIMITS.deadline_s,
    drain: pool_options.Drain = DEFAULT_LIMITS.drain_s,
    trust: pool_options.Trust = None,
    dtype: options.Dtype = "float32",
    weights: options.Weights = "native",
    draft_weights: options.DraftWeights = "",
    device: options.Device = "cpu",
    threads: options.SharedThreads = "auto",
    kv_mode: options.CacheMode = "project",
    hold: pool_options.Holds = None,
    hold_rows: pool_options.HoldRows = 4,
    hold_patience: pool_options.HoldPatience = 4,
    together: pool_options.Together = False,
    costs: pool_options.ScheduleCosts = None,
    prefill_tokens: options.PrefillTokens = 256,
    prefill: pool_options.PrefillWay = "full",
    prompt_policy: pool_options.PromptPolicy = None,
    prompt_keep: pool_options.PromptKeep = pool_options.PROMPT_KEEP,
    max_pending: options.MaxPending = 8,
    kv_budget_mb: options.CacheBudget = None,
    prefix_cache_mib: options.PrefixCache = 0.0,
    translators: options.Translators = None,
    log_format: pool_options.LogFormat = None,
    channel: Channel = None,
) -> None:
    """Serve models on Ray Serve with OpenAI's completion routes; workers follow the registry."""
    given = locals()
    settings = Settings.from_environment(channel=channel)
    # Where the command starts Ray, it alone says how many there are: a redeploy may ask for more.
    cpus = 0.0 if settings.ray_address is None else 1.0
    config = config_of(context, given, settings, cpus)
    _serve(config, settings, trust, redis_port, lambda: models_to_serve(context, given, cpus))


def _serve(
    config: PoolConfig,
    settings: Settings,
    trust: Path | None,
    redis_port: int,
    models: Callable[[], tuple[PoolModel, ...]],
) -> None:
    """Serve until told to stop, and anew, with what ``models`` then says, when told so."""
    _require_servable(config, settings, trust, redis_port)
    tell = _logger.info if config.log_format == "json" else console.print
    with contextlib.ExitStack() as stack:
        if settings.redis_url is None:
            embedded = EmbeddedRedis(settings.home / "redis", redis_port, supervised=True)
            redis = stack.enter_context(embedded)
            config = replace(config, redis_url=redis.url)
            tell(f"embedded Redis: export REDIS_URL={redis.url}")
        if trust is None:
            public_key_path(settings)
        stack.enter_context(ray_session(settings.ray_address, os.cpu_count() or 1))
        pool = stack.enter_context(running_pool(config))
        wait = catch_signals()
        tell(f"{_described(config)} on {pool.url}/v1; Ctrl-C stops it")
        while wait() == REDEPLOY:
            try:
                config = replace(config, models=models())
                pool.redeploy(config)
                tell(f"redeployed: {_described(config)}")
            except (OfframpError, OSError) as error:
                tell(f"not redeployed: {error}")


def _described(config: PoolConfig) -> str:
    said = []
    for model in config.models:
        grown = "" if model.growth is None else f" to {model.most_replicas}"
        workers = f"{model.replicas}{grown} workers, threads: {model.worker.threads} each"
        said.append(f"{model.name} with {workers}")
    return ", ".join(said)


def _require_servable(
    config: PoolConfig, settings: Settings, trust: Path | None, redis_port: int
) -> None:
    """Every check that needs no worker, before anything is written or started."""
    require_servable(config, settings)
    require_free(config.host, config.port)
    if trust is not None:
        load_root(trust)
    if settings.redis_url is None:
        require_free("127.0.0.1", redis_port, "redis_port")
    else:
        open_registry(settings).close()
