"""A pool that Ray Serve deploys from a file, with ``serve deploy`` or KubeRay's RayService."""

from __future__ import annotations

import secrets
from typing import Any, cast

import typer
from ray import serve
from typer.main import get_command

from offramp.controller.errors import ConfigError
from offramp.controller.keys.root import load_root
from offramp.deploy.cli.pool.model_tables import read_options
from offramp.deploy.cli.pool.pool_configs import config_of, require_servable
from offramp.deploy.cli.pool.serving import add_to
from offramp.deploy.serve.pool_entrance import application_of
from offramp.deploy.serve.publishing import open_registry
from offramp.deploy.serve.settings import Settings

CPUS = 1.0
"""Cores that Ray sets aside per worker; ``ray_actor_options`` of the file may say otherwise."""


def pool(args: dict[str, Any]) -> serve.Application:
    """Build a pool from the options of ``offramp serve``, as ``args`` of an application.

    Args:
        args: Values by the options' names, with underscores; paths are those of the cluster's
            machines. What the command reads from the environment is read from Ray's.

    Raises:
        ConfigError: an option is unusable, or there is no registry that all machines reach.
        ModelError: a model cannot be served.
    """
    app = typer.Typer()
    add_to(app)
    command = get_command(app)
    like = cast("typer.Context", command.make_context("serve", [], resilient_parsing=True))
    context = read_options(like, args, "args: ", "a pool", ("redis_port",))
    settings = Settings.from_environment(channel=context.params["channel"])
    if settings.redis_url is None:
        problem = "is not set where Ray runs, and a pool over a cluster starts no Redis"
        raise ConfigError("REDIS_URL", problem, "Set it in the environment of ray start")
    config = config_of(context, context.params, settings, CPUS)
    require_servable(config, settings)
    load_root(config.trusted)
    open_registry(settings).close()
    return application_of(config, f"front-{secrets.token_hex(8)}")
