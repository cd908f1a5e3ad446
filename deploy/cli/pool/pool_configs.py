"""Makes what a pool is made of, from the options of ``offramp serve`` and the environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import typer

from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.pool import pool_options
from offramp.deploy.cli.pool.model_tables import models_of
from offramp.deploy.clients.client_keys import CLIENTS, ClientKeys
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.observability.tracing import require_exporter
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.publishing import PUBLIC_KEY
from offramp.deploy.serve.settings import Settings
from offramp.deploy.serve.worker_deployments import require_classifier
from offramp.worker.classifying.class_heads import labels_in
from offramp.worker.decoding.prompting.prompt_exits import Prefill, PromptExits
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision
from offramp.worker.spec import TrafficConfig, WorkerSpec


def config_of(
    context: typer.Context, given: dict[str, Any], settings: Settings, cpus: float
) -> PoolConfig:
    """What a pool is made of.

    Args:
        context: The command ``offramp serve``.
        given: The options that it was given.
        settings: What the environment says.
        cpus: Cores that Ray sets aside per worker.

    Raises:
        ConfigError: an option is unusable, or two that do not go together.
    """
    return PoolConfig(
        models=models_to_serve(context, given, cpus),
        limits=HttpLimits(
            body_bytes=given["max_body_bytes"],
            choices=given["max_choices"],
            deadline_s=given["deadline"],
            drain_s=given["drain"],
        ),
        redis_url=settings.redis_url or "",
        max_adapter_mb=settings.max_adapter_mb,
        trusted=(given["trust"] or settings.home / PUBLIC_KEY).resolve(),
        state_dir=(settings.home / "workers").resolve(),
        access_log=settings.access_log and settings.access_log.resolve(),
        otlp_endpoint=settings.otlp_endpoint,
        clients=ClientKeys(settings.home / CLIENTS, settings.api_key),
        **{each: given[each] for each in ("host", "port", "log_format")},
    )


def require_servable(config: PoolConfig, settings: Settings) -> None:
    """Check what can be without a worker, on the machine where this runs.

    Raises:
        ConfigError, ModelError: naming what is at fault.
    """
    for model in config.models:
        if model.heads is None:
            options.require_loadable(model.worker, settings)
        else:
            require_classifier(model, settings)
    if config.access_log is not None:
        options.require_writable("OFFRAMP_ACCESS_LOG", config.access_log)
    if config.otlp_endpoint is not None:
        require_exporter()


def models_to_serve(
    context: typer.Context, given: dict[str, Any], cpus: float
) -> tuple[PoolModel, ...]:
    """What is to be served; of a file, what it says now. See ``config_of``."""
    named = models_of(context, given)
    usual = {each.name: each.default for each in context.command.params}
    for each in named.values():
        if each["classify"] is not None:
            odd = {key: each[key] != usual[key] for key in pool_options.OF_DECODING}
            options.require_unused(odd, "means nothing with --classify")
    workers = sum(each["max_replicas"] or each["replicas"] for each in named.values())
    return tuple(_model(name, each, workers, cpus) for name, each in named.items())


def _model(name: str, given: dict[str, Any], workers: int, cpus: float) -> PoolModel:
    """One model, from the options of the command; cores are for so many workers."""
    settings = Settings.from_environment(channel=given["channel"])
    heads = given["classify"] and given["classify"].resolve()
    return PoolModel(
        name=name,
        worker=_worker(given, workers),
        heads=heads,
        labels=labels_in(heads) if heads else (),
        channel=settings.channel,
        growth=pool_options.growth_of(given),
        traffic=_kept_traffic(settings),
        cpus=cpus,
        **{each: given[each] for each in ("replicas", "max_waiting")},
    )


def _worker(given: dict[str, Any], workers: int) -> WorkerSpec:
    """What each worker loads, from the options of the command."""
    model = given["model"]
    return WorkerSpec(
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        threads=options.parse_threads(given["threads"], workers),
        engine=_decoding(given),
        **{name: given[name] for name in ("dtype", "device", "slots")},
    )


def _with_prompts(
    engine: EngineConfig, tokens: int, prefill: str, bundle: Path | None, keep: str
) -> EngineConfig:
    """Read prompts as the options say.

    Raises:
        ConfigError: an unknown way, a bundle that is none for prompts, or no two numbers.
    """
    like = pool_options.PROMPT_KEEP
    kept = options.parse_list("prompt_keep", keep, int, "numbers of tokens", like)
    if len(kept) != 2:
        raise ConfigError("prompt_keep", f"{keep!r} is not two numbers", f"Write it like {like}")
    if bundle is None and keep != like:
        problem = "does nothing without a policy for prompts"
        raise ConfigError("prompt_keep", problem, "Give --prompt-policy, or leave it out")
    prompts = None
    if bundle is not None:
        prompts = PromptExits.load(bundle, keep_first=kept[0], keep_last=kept[1])
    if prefill == "exits" and bundle is None:
        problem = "exits needs a policy for prompts"
        raise ConfigError("prefill", problem, "Give --prompt-policy, or full")
    way = cast(Prefill, prefill)  # EngineConfig refuses an unknown one
    return replace(engine, prefill_tokens=tokens, prefill=way, prompts=prompts)


def _decoding(given: dict[str, Any]) -> EngineConfig:
    """How workers decode, from the options of the command.

    Raises:
        ConfigError: an option is unusable.
    """
    plan = pool_options.parse_schedule(
        given["hold"], given["hold_rows"], given["hold_patience"],
        together=given["together"], costs=given["costs"],
    )  # fmt: skip
    same = ("kv_budget_mb", "prefix_cache_mib")
    config = replace(
        options.engine_config(
            given["kv_mode"], given["max_pending"], given["translators"], given["weights"]
        ),
        schedule=plan,
        draft_precision=Precision.of_copy(given["draft_weights"]),
        **{name: given[name] for name in same},
    )
    prompts = ("prefill_tokens", "prefill", "prompt_policy", "prompt_keep")
    return _with_prompts(config, *(given[name] for name in prompts))


def _kept_traffic(settings: Settings) -> TrafficConfig | None:
    """What the environment says that workers keep; None: nothing."""
    if settings.traffic is None:
        return None
    return TrafficConfig(
        folder=(settings.traffic / settings.channel).resolve(),
        most_mb=settings.traffic_mb,
        time_share=settings.traffic_share,
        keep_text=settings.traffic_text,
    )
