"""Run ``offramp learn``: policies that follow the traffic, by themselves up to a canary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from offramp.agents.calibration.calibrate import parse_promise
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.retraining.retrainer import Retrainer
from offramp.controller.errors import ConfigError, PromoteConflictError, RegistryUnavailableError
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps
from offramp.deploy.cli import options
from offramp.deploy.cli.console import say
from offramp.deploy.cli.releases.channel_option import Channel
from offramp.deploy.serve.publishing import KEY, open_publisher, open_registry
from offramp.deploy.serve.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("learn")(learn)


Traces = Annotated[Path, typer.Option(help="Traces that the served policy was trained on.")]
Watch = Annotated[bool, typer.Option("--watch", help="Stay, and look again and again.")]
FalseAlarms = Annotated[float, typer.Option(help="Chance of a false alarm at each test of drift.")]
TestMethod = Annotated[
    str, typer.Option(help="hoeffding-bentkus|betting; betting certifies more on few requests.")
]
AutoPromote = Annotated[
    bool, typer.Option("--auto-promote", help="Move the canary on, too, by --canary-steps.")
]
CanarySteps = Annotated[
    Path | None,
    typer.Option(help="With --auto-promote: YAML file of `watch`.", show_default="its defaults"),
]


def learn(
    traces: Traces,
    watch: Watch = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 30.0,
    false_alarms: FalseAlarms = 0.01,
    window: Annotated[int, typer.Option(help="Requests of each test.")] = 40,
    tokens: Annotated[
        int, typer.Option(min=0, help="Tokens that are reason enough; 0: drift alone is.")
    ] = 0,
    requests: Annotated[int, typer.Option(help="Requests to learn from, at least.")] = 200,
    delta: Annotated[float, typer.Option(help="Bound on the share of disagreement.")] = 0.05,
    epsilon: Annotated[float, typer.Option(help="Probability that it may not hold.")] = 0.05,
    method: TestMethod = "hoeffding-bentkus",
    percent: Annotated[float, typer.Option(min=0, max=100, help="Of the canary's first step.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="PPO environment steps.")] = 300_000,
    threads: options.Threads = 1,
    dtype: options.Dtype = "float32",
    auto_promote: AutoPromote = False,
    canary_steps: CanarySteps = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of rounds.", show_default="in OFFRAMP_HOME")
    ] = None,
    channel: Channel = None,
) -> None:
    """Train on live traffic once it has drifted, certify, and begin a canary.

    Workers must keep traffic (OFFRAMP_TRAFFIC). Without --watch one step is taken. Killed, the same
    command goes on where it was.
    """
    if canary_steps is not None and not auto_promote:
        raise ConfigError("canary_steps", "goes with --auto-promote alone", "Leave it out")
    settings = Settings.from_environment(channel=channel)
    config = RetrainConfig(
        traces=traces,
        traffic=_traffic_folder(settings),
        out=out or settings.home / "learning" / settings.channel,
        false_alarms=false_alarms,
        window=window,
        tokens=tokens,
        requests=requests,
        promise=parse_promise(delta, epsilon, method, "document"),
        percent=percent,
        steps=steps,
        threads=threads,
        dtype=dtype,
    )
    plan = None if not auto_promote else Steps.load(canary_steps) if canary_steps else Steps()
    _require_key(settings)
    registry = open_registry(settings)
    try:
        publisher = open_publisher(settings, registry)
        overseer = Overseer(publisher, registry, 2, plan) if plan else None
        _look(Retrainer(config, publisher, registry), overseer, every if watch else None)
    finally:
        registry.close()


def _look(retrainer: Retrainer, overseer: Overseer | None, every: float | None) -> None:
    """Look once, or for as long as nobody ends it."""
    while True:
        try:
            if story := retrainer.look():
                say(story)
            if overseer is not None and (story := overseer.look()):
                say(story)
        except (RegistryUnavailableError, PromoteConflictError) as error:
            if every is None:
                raise
            say(f"{error} Trying again.")
        if every is None:
            return
        if not retrainer.is_under_way:
            time.sleep(every)


def _traffic_folder(settings: Settings) -> Path:
    if settings.traffic is None:
        raise ConfigError(
            "OFFRAMP_TRAFFIC", "is not set", "Set it as for offramp serve, which fills the folder"
        )
    return settings.traffic / settings.channel


def _require_key(settings: Settings) -> None:
    """Refuse to go on where no signing key lies: a new one would be trusted by nobody."""
    path = settings.home / KEY
    if not path.exists():
        problem = f"{path} is not there, and a canary has to be signed"
        raise ConfigError("key", problem, "Set OFFRAMP_HOME to the publisher's folder")
