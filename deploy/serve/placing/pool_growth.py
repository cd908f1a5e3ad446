"""Has Ray Serve start and stop workers by what those that there are have to do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from offramp.controller.errors import ConfigError

COMPLETIONS, TOKENS = "completions", "tokens"
"""What a worker reports of its load, by ``load_of``."""

LOOK_BACK_S = 15.0
"""Load is averaged over so long. Workers report it each second if they find the time: over a few
seconds, one that is busy would at times seem to have nothing to do."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGrowth:
    """How far a pool may grow, and by what.

    Attributes:
        most: Most workers.
        completions: Completions that a worker is to have on average, in slots and in line.
        tokens: Tokens that the requests of a worker are to come to on average: those of their
            prompts, and all that they may make; None: they do not count.
        up_s: Seconds for which the pool must have had too much to do before it grows.
        down_s: Seconds for which it must have had too little before it shrinks.

    Raises:
        ConfigError: a number out of range.
    """

    most: int
    completions: float
    tokens: float | None = None
    up_s: float = 10.0
    down_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("completions", "tokens", "up_s", "down_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(name, f"{value} is not above 0")

    def serve_config(self, fewest: int) -> AutoscalingConfig:
        """What Ray Serve is told.

        Args:
            fewest: Workers that there are in any case.
        """
        targets = {"completions": self.completions, "tokens": self.tokens}
        return AutoscalingConfig(
            min_replicas=fewest,
            max_replicas=self.most,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=self.up_s,
            downscale_delay_s=self.down_s,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:{WorkersWanted.__name__}", policy_kwargs=targets
            ),
        )


class WorkersWanted:
    """Asks for as many workers as bring each load to its target, the higher of the two.

    Ray Serve calls it in its controller, and applies bounds and delays to what it says.

    Args:
        completions, tokens: See ``PoolGrowth``.
    """

    def __init__(self, completions: float, tokens: float | None) -> None:
        self._targets = {COMPLETIONS: completions, TOKENS: tokens}

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Workers that are wanted, and no state; as many as there are before any has reported."""
        loads = context.aggregated_metrics
        return (self.wanted(loads) if loads else context.target_num_replicas), {}

    def wanted(self, loads: Mapping[str, Mapping[Any, float]]) -> float:
        """Workers that are wanted, from each load of each worker."""
        return max(
            sum(loads.get(name, {}).values()) / target
            for name, target in self._targets.items()
            if target is not None
        )


def load_of(running: int, waiting: int, tokens: int) -> dict[str, float]:
    """What a worker reports of its load to Ray Serve."""
    return {COMPLETIONS: running + waiting, TOKENS: tokens}


def tell_shortage(cpus: float) -> None:
    """Say that workers wait for room, if Ray has less: it would wait for ever, and say nothing."""
    free = cpus
    with contextlib.suppress(ray.exceptions.RayError):  # who asks is busy with something else
        free = ray.available_resources().get("CPU", 0.0)
    if cpus > free:
        _logger.warning(
            "new workers take %g of Ray's cores, and %g are free: they wait until more nodes join "
            "or others end",
            cpus,
            free,
        )
