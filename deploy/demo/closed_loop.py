"""The whole demo, top to bottom."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
import uuid
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offramp.agents.placing.contenders import CHOSEN
from offramp.controller.durable import write_durably
from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.deploy.cli.console import console
from offramp.deploy.cli.evaluating import SLOTS
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.demo.classify_act import classify_act
from offramp.deploy.demo.demo_config import DemoConfig, free_port, prepare_folder
from offramp.deploy.demo.learn import (
    SHOWN,
    Drafted,
    assess_config,
    learn,
    learn_to_draft,
    prompts,
    traces_report,
)
from offramp.deploy.demo.show import show_completion, show_speed, show_swap
from offramp.deploy.demo.swap import ControlPanel, request_report, swap_under_load
from offramp.deploy.demo.traffic import StreamRecord, Traffic, tokens_per_s
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.publishing import open_publisher, open_registry, public_key_path
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.serve_app import ray_session, running_pool
from offramp.deploy.serve.settings import Settings
from offramp.worker.model.loading import check_model, load_config, parse_dtype
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import ModelFacts, WorkerSpec

VERSIONED = (
    "offramp", "torch", "transformers", "gymnasium", "stable-baselines3", "ray", "redis", "numpy",
)  # fmt: skip


def run_demo(config: DemoConfig, settings: Settings) -> dict[str, Any]:
    """Learn to draft, publish, hot-swap, query, roll back; then exit with some loss, and classify.

    Returns and writes the report.

    Raises:
        OfframpError: a step cannot be done; what was started is stopped.
    """
    started = time.monotonic()
    check_model(config.model)
    prepare_folder(config.out)
    model = str(Path(config.model).resolve())
    spec = WorkerSpec(model=model, dtype=config.dtype, threads=config.threads)
    with contextlib.ExitStack() as stack:
        settings = _own_settings(config, settings, stack)
        cpus = max(config.replicas, os.cpu_count() or 1)
        stack.enter_context(ray_session(settings.ray_address, cpus))
        drafted = learn_to_draft(config, spec)
        served = _serve(config, settings, spec, drafted)
        lossy = {} if config.is_lossless else _with_loss(config, spec)
    if not config.is_lossless:
        lossy["classification"] = classify_act(config, "7  ")
    report = {
        "machine": _machine(config),
        "model": _model(config, drafted.facts),
        "drafting": drafted.report(),
        **lossy,
        **served,
        "seconds": time.monotonic() - started,
    }
    _end(config, report, ", frontier.png, exit_depths.png" if lossy else "")
    return report


def run_classification(config: DemoConfig) -> dict[str, Any]:
    """Run the last act alone: no pool, no Redis.

    Returns and writes the report.

    Raises:
        OfframpError: the model cannot be used.
    """
    load_config(config.model)  # refused before a folder is emptied
    prepare_folder(config.out)
    found = classify_act(config)
    report = {
        "machine": _machine(config), "classification": found, "seconds": found["seconds"]
    }  # fmt: skip
    _end(config, report)
    return report


def _end(config: DemoConfig, report: dict[str, Any], pictures: str = "") -> None:
    write_durably(config.out / "report.json", json.dumps(report, indent=1).encode())
    console.rule(f"[bold]Done[/] in {report['seconds']:.0f} s", align="left")
    console.print(f"  {config.out}/report.json{pictures}")


def _with_loss(config: DemoConfig, spec: WorkerSpec) -> dict[str, Any]:
    """The second act: learn what some loss would buy, with its pictures."""
    learned = learn(config, spec)
    for name in ("frontier.png", "exit_depths.png"):
        shutil.copyfile(config.out / "policies" / name, config.out / name)
    return {
        "filled": [asdict(each) for each in learned.filled],
        "traces": traces_report(learned),
        "policies": [asdict(row) for row in learned.assessment.test],
        "chosen": learned.chosen.name,
        "reason": learned.assessment.reason,
    }


def _serve(
    config: DemoConfig, settings: Settings, spec: WorkerSpec, drafted: Drafted
) -> dict[str, Any]:
    console.rule("[bold]2  Serve[/]: a Ray Serve pool under the full-depth policy", align="left")
    spec = replace(spec, engine=config.engine)
    registry = open_registry(settings)
    publisher = open_publisher(settings, registry)
    panel = ControlPanel(publisher, registry, config.replicas, drafted.facts)
    first = panel.publish_full_depth()
    with contextlib.closing(registry), running_pool(_pool(config, settings, spec)) as pool:
        panel.await_workers(first)
        console.print(f"  {config.replicas} workers answer on {pool.url}/v1, generation {first}")
        traffic = Traffic(pool.url, _model_id(config), config.new_tokens, settings.api_key)
        return _exercise(config, panel, traffic)


def _exercise(config: DemoConfig, panel: ControlPanel, traffic: Traffic) -> dict[str, Any]:
    timed = prompts(config, config.prompts)
    traffic.one_by_one(timed[:2])  # warm both workers before anything is timed
    before = traffic.one_by_one(timed)
    console.rule("[bold]3  Hot-swap[/]: sign, publish, swap under live streams", align="left")
    chosen = config.out / "drafters" / CHOSEN
    swap = swap_under_load(panel, traffic, chosen, prompts(config, config.in_flight))
    show_swap(swap)
    console.rule("[bold]4  Query[/]: the same prompts under the learned drafter", align="left")
    after = traffic.one_by_one(timed)
    for record in after[: len(SHOWN)]:
        show_completion(record)
    is_same = _texts(after) == _texts(before)
    console.print(
        "  every token is full depth's" if is_same else "  some token is not full depth's",
        style="bold",
    )
    console.rule("[bold]5  Roll back[/]: a new generation with the old policy", align="left")
    rollback = asdict(panel.roll_back())
    restored = traffic.one_by_one(timed)
    rollback["text_as_before"] = _texts(restored) == _texts(before)
    rollback["tokens_per_s"] = tokens_per_s(restored)
    acknowledged = ", ".join(f"{name} {ms:.0f} ms" for name, ms in rollback["ack_ms"].items())
    console.print(f"  generation {rollback['generation']}, acknowledged {acknowledged}")
    show_speed(before, after, restored)
    return {
        "swap": swap,
        "requests": {
            "before": request_report(before),
            "after": request_report(after),
            "text_as_before": is_same,
            "tokens_per_s_before": tokens_per_s(before),
            "tokens_per_s_after": tokens_per_s(after),
        },
        "rollback": rollback,
    }


def _own_settings(config: DemoConfig, settings: Settings, stack: contextlib.ExitStack) -> Settings:
    url = settings.redis_url
    if url is None:
        url = stack.enter_context(EmbeddedRedis(config.out / "redis")).url
    # A channel of its own: on a shared Redis the demo must neither meet anybody's releases nor
    # leave its own behind.
    channel = f"demo-{uuid.uuid4().hex[:8]}"
    own = settings.model_copy(
        update={"redis_url": url, "channel": channel, "home": config.out / "home"}
    )
    registry = stack.enter_context(contextlib.closing(open_registry(own)))
    stack.callback(_forget, registry)
    return own


def _forget(registry: RedisRegistry) -> None:
    # At the end of an interrupted demo, a Redis that is gone has nothing left to clean.
    with contextlib.suppress(RegistryUnavailableError):
        registry.forget()


def _pool(config: DemoConfig, settings: Settings, spec: WorkerSpec) -> PoolConfig:
    model = PoolModel(
        worker=spec, name=_model_id(config), channel=settings.channel, replicas=config.replicas
    )
    return PoolConfig(
        models=(model,),
        redis_url=settings.redis_url or "",
        trusted=public_key_path(settings).resolve(),
        state_dir=(config.out / "workers").resolve(),
        port=config.port or free_port(),
        clients=ClientKeys(shared=settings.api_key),
    )


def _model_id(config: DemoConfig) -> str:
    return Path(config.model).resolve().name


def _machine(config: DemoConfig) -> dict[str, Any]:
    return {
        "description": describe_machine(parse_dtype(config.dtype)),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
        "torch_threads": torch.get_num_threads(),
    }


def _model(config: DemoConfig, facts: ModelFacts) -> dict[str, Any]:
    protocol = assess_config(config, config.model).protocol
    return {
        "path": config.model,
        **asdict(facts),
        "dtype": config.dtype,
        "shapes": {
            "timing": {
                "batch": 1,
                "prompt_tokens": protocol.prompt_tokens,
                "new_tokens": protocol.timed_tokens,
            },
            "quality": {"batch": SLOTS, "prompt_tokens": protocol.prompt_tokens},
            "new_tokens_per_document": protocol.new_tokens,
            "test_documents": config.test_documents,
            "lines_per_document": protocol.lines,
            "timed_documents": config.timed_documents,
            "request_tokens": config.new_tokens,
        },
        "seeds": {"phat": config.seed, "ppo": config.seed, "bootstrap": config.seed},
    }


def _texts(records: list[StreamRecord]) -> list[list[str]]:
    return [record.texts for record in records]
