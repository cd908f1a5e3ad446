"""One staged run per seed, as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from offramp.agents.training.resuming import CHECKPOINT
from offramp.agents.training.train import train
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.errors import ConfigError


def sweep(
    config: TrainConfig,
    seeds: Sequence[int],
    out: Path,
    on_run: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, list[dict[str, Any]]]:
    """Train every seed in a folder of its own, ``seed-N``; as many at once as Ray has CPUs.

    Ray must be up. A seed that has a checkpoint goes on from it: after an interrupted sweep, and
    when Ray tries a task again that its process did not survive.

    Args:
        config: Settings of every run, but for the seed.
        seeds: Distinct seeds, one per run.
        out: Where the folders are created; on a cluster, a folder that all machines share.
        on_run: Told (runs done, runs in all).

    Returns:
        Family, setting and offline agreement of each run's contenders, by seed.

    Raises:
        ConfigError: seeds that are not distinct, or an on-policy phase, which would start
            collectors within each task.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError("seeds", f"{list(seeds)} are not distinct", "Write them like 0,1,2")
    if config.onpolicy.rounds:
        raise ConfigError("seeds", "do not go with an on-policy phase", "Set onpolicy.rounds to 0")
    task = ray.remote(num_cpus=config.threads)(_train)
    waiting = {
        task.remote(replace(config, seed=seed), out / f"seed-{seed}"): seed for seed in seeds
    }
    found: dict[int, list[dict[str, Any]]] = {}
    while waiting:
        [done], _ = ray.wait(list(waiting), num_returns=1)
        found[waiting.pop(done)] = ray.get(done)
        on_run(len(found), len(seeds))
    return {seed: found[seed] for seed in seeds}


def _train(config: TrainConfig, out: Path) -> list[dict[str, Any]]:
    # With a checkpoint a second attempt, or a second sweep, goes on where the first one stopped.
    contenders = train(config, out, resume=(out / CHECKPOINT).exists())
    return [
        {"family": c.family, "setting": c.setting, "offline_agreement": c.offline_agreement}
        for c in contenders
    ]
