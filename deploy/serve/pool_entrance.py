"""A pool as one application of Ray Serve: its workers, and who keeps their front."""

from __future__ import annotations

import time
from typing import Any

from ray import serve

from offramp.controller.errors import ConfigError
from offramp.deploy.serve.fronting.front_keeper import LOOK_S, STOP_S, FrontKeeper
from offramp.deploy.serve.log_lines import send_lines, show_line
from offramp.deploy.serve.loopback import keep_to_loopback
from offramp.deploy.serve.pool_config import PoolConfig
from offramp.deploy.serve.serve_app import require_free
from offramp.deploy.serve.worker_deployments import HEALTH_S, QUIET, workers_of

ENTRANCE = "entrance"
"""Name of the deployment that keeps the front; no model can have it in such a pool."""

HEAD = "node:__internal_head__"
"""What Ray's head has of it, and no other node: clients find the front there."""


class PoolEntrance:
    """Keeps a front beside workers of the same application; Ray Serve runs one.

    Args:
        config: What the pool is made of.
        front: Names the front to the workers.
        workers: Are deployed with this, as Ray Serve hands them in.
    """

    def __init__(self, config: PoolConfig, front: str, *workers: Any) -> None:
        keep_to_loopback()
        send_lines(config.log_format, ENTRANCE, show_line)
        self._keeper = FrontKeeper(config, front)
        _await_free(config)
        self._keeper.start()
        for model in config.models:
            self._keeper.connect(model, serve.get_replica_context().app_name)

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process in order: streams under way end first."""
        if keeper := getattr(self, "_keeper", None):
            keeper.end()


def _await_free(config: PoolConfig) -> None:
    """Wait for the port of a pool that this one replaces, which first ends what it has.

    Raises:
        ConfigError: somebody else has it.
    """
    end_s = time.monotonic() + config.limits.drain_s + STOP_S
    while True:
        try:
            require_free(config.host, config.port)
            return
        except ConfigError:
            if time.monotonic() > end_s:
                raise
            time.sleep(LOOK_S)


def application_of(config: PoolConfig, front: str) -> serve.Application:
    """A pool as Ray Serve deploys it from a file.

    Args:
        config: What it is made of.
        front: A name that no other front of the cluster has.

    Raises:
        ConfigError: a model has the name of the deployment that keeps the front.
    """
    if ENTRANCE in {model.deployment for model in config.models}:
        raise ConfigError("models", f"one is named {ENTRANCE!r}, as what keeps the front is")
    entrance = serve.deployment(PoolEntrance).options(
        name=ENTRANCE,
        num_replicas=1,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=config.limits.drain_s + STOP_S,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        logging_config=QUIET,
    )
    workers = [workers_of(config, model, front) for model in config.models]
    return entrance.bind(config, front, *workers)
