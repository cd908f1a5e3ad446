"""The Ray Serve pool: workers in replicas, and one front that clients talk to."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offramp.controller.errors import ConfigError, OfframpError
from offramp.deploy.serve.front import Front, app_of, worker_class
from offramp.deploy.serve.log_lines import show_line
from offramp.deploy.serve.placing.pool_growth import tell_shortage
from offramp.deploy.serve.placing.worker_router import WorkerRouter
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.worker.classifying.sequence_model import check_classifier
from offramp.worker.model.loading import check_model

HEALTH_S = 1.0
"""Seconds between two questions of Ray Serve to a worker how it is."""

FROZEN_S = 4.0
"""A worker that does not answer them for so long is replaced."""

ASK_OFTEN = {"RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S": "0.25"}
"""Requests of one burst are spread by what was sent; after it workers that were not heard of lately
are asked for their load again: one that froze does not answer."""

OF_SERVE = {
    # Else Ray Serve asks a worker that answers nothing to end, and waits as long as draining may
    # take before the next one gets its place.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # Seconds: else a pool that grows hears of its workers' load every ten.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
"""Settings of Ray Serve's processes. Of a cluster that is joined, whoever starts Ray sets them."""

FEW_ARENAS = ("MALLOC_ARENA_MAX", "2")
"""Ray gives each process some forty threads, and glibc each of them a heap of its own, up to eight
per core: what one frees another cannot use, and memory grows for hours though nothing is kept."""

AS_URGENT = {"worker_niceness": 0}
"""Ray's processes would give way to all others of the machine, and wake up too late."""

_RAISED = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b(: |$)")
"""The line of a traceback that says what was raised."""

STOP_S = 15.0
"""Seconds that the front has for its end beyond those for draining."""


@contextlib.contextmanager
def running_pool(config: PoolConfig) -> Iterator[RunningPool]:
    """Deploy a pool on the current Ray cluster, and shut it down after.

    Raises:
        ConfigError: the port is taken.
        ModelError: the model folder cannot be served.
    """
    for model in config.models:
        require_model(model)
    require_free(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="Disabled",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    with contextlib.ExitStack() as stack:
        stack.callback(_shut_down)
        front = stack.enter_context(_listening(config))
        if config.log_format is not None:
            threading.Thread(target=_show_lines, args=(front,), daemon=True).start()
        pool = RunningPool(config, front)
        pool.start(config, config.models)
        yield pool


class RunningPool:
    """A pool that serves, and whose workers can be replaced meanwhile.

    Args:
        config: What it is made of.
        front: The actor that clients talk to.

    Attributes:
        url: Base of its routes.
    """

    def __init__(self, config: PoolConfig, front: Any) -> None:
        self.url = f"http://{config.host}:{config.port}"
        self._front = front
        self._turn = 0
        self._apps: dict[str, str] = {}

    def start(self, config: PoolConfig, models: Sequence[PoolModel]) -> None:
        """Start workers of models, and send requests to them once all are up.

        Raises:
            ConfigError: a worker cannot start.
        """
        tell_shortage(sum(model.replicas * model.cpus for model in models))
        apps = {model.name: app_of(model, self._turn) for model in models}
        try:
            _deploy([_target(config, model, self._front, apps[model.name]) for model in models])
        except BaseException:
            for app in apps.values():
                serve.delete(app)
            raise
        for model in models:
            ray.get(self._front.connect.remote(model, apps[model.name]))
        self._apps |= apps

    def redeploy(self, config: PoolConfig) -> None:
        """Replace the workers of one model after the other, without a request that is lost.

        New ones start beside the old ones, which end what they have once requests go to the new.

        Args:
            config: The same models, otherwise served; what is not of a model stays as it was.

        Raises:
            ConfigError: it is not of the same models, or a worker cannot start; then the old ones
                of this model and of those behind it stay.
            ModelError: a model folder cannot be served; then all stay.
        """
        if [model.name for model in config.models] != list(self._apps):
            known = ", ".join(self._apps)
            raise ConfigError("models", f"are not {known} any more", "Start another pool for that")
        for model in config.models:
            require_model(model)
        self._turn += 1
        for model in config.models:
            before = self._apps[model.name]
            self.start(config, [model])
            with contextlib.suppress(TimeoutError):  # it goes on ending what it has
                serve.delete(before)


def _target(config: PoolConfig, model: PoolModel, front: Any, app: str) -> serve.RunTarget:
    """The workers of one model, as Ray Serve is to run them."""
    workers = serve.deployment(worker_class(model)).options(
        **model.size,
        # The front takes no more than all workers have room for; this spreads them.
        max_ongoing_requests=model.room,
        request_router_config=RequestRouterConfig(request_router_class=WorkerRouter),
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=FROZEN_S,
        graceful_shutdown_timeout_s=config.limits.drain_s,
        ray_actor_options={"num_cpus": model.cpus},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    bound = workers.bind(config, model, front)
    return serve.RunTarget(bound, name=app, route_prefix=None)


def require_model(model: PoolModel) -> None:
    """Refuse a model that cannot be served as it is to be, without loading its weights.

    Raises:
        ModelError: the model folder cannot be served.
        ConfigError: the folder of heads holds none.
    """
    if model.heads is None:
        check_model(model.worker.model)
    else:
        check_classifier(model.worker.model, model.heads)


def _deploy(targets: list[serve.RunTarget]) -> None:
    """Start all workers; returns once they are up.

    Raises:
        ConfigError: a worker cannot start, with what it said last.
    """
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise ConfigError("workers", f"none could start: {_last_words(error)}") from error


def _last_words(error: BaseException) -> str:
    """What an exception that holds another process's traceback says at its end, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    last = (raised or lines or [type(error).__name__])[-1]
    return re.sub(r"^offramp\.[\w.]+: ", "", last).rstrip(".")


def _shut_down() -> None:
    with _muted():
        serve.shutdown()


@contextlib.contextmanager
def _listening(config: PoolConfig) -> Iterator[Any]:
    """A front on this machine; requests under way when the block ends are let end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Front).options(
        num_cpus=0,
        max_concurrency=1000,
        scheduling_strategy=here,
        runtime_env={"env_vars": ASK_OFTEN},
    )
    front = actor.remote(config)
    try:
        ray.get(front.listen.remote())
        try:
            yield front
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(front.drain.remote(), timeout=config.limits.drain_s + STOP_S)
    finally:
        ray.kill(front)


def _show_lines(front: Any) -> None:
    """Show what the pool's processes log, for as long as there is a front."""
    with contextlib.suppress(ray.exceptions.RayError):
        while True:
            for line in ray.get(front.lines.remote()):
                show_line(line)


@contextlib.contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[None]:
    """Join a Ray cluster, or start a local one; leave it, or stop it, after.

    Raises:
        ConfigError: nobody answers at the address, or Ray does not start here.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        for setting in (*OF_SERVE.items(), FEW_ARENAS):
            os.environ.setdefault(*setting)  # Ray's processes take it over
        options |= {
            "num_cpus": cpus,
            "include_dashboard": False,
            "address": "local",
            "_system_config": AS_URGENT,
        }
    else:
        options["address"] = address
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:  # of whatever Ray starts or asks
        if address is None:
            problem = f"cannot be started here: {_last_words(error)}"
            raise ConfigError("ray", problem, "Try again once the machine is less busy") from error
        raise ConfigError(
            "RAY_ADDRESS",
            f"no Ray cluster lets us in at {address!r}",
            # Ray sends its token to an explicit address only if told to.
            "Start one or unset it; if it asks for a token, set RAY_AUTH_MODE=token",
        ) from error
    # Ray puts its own in place, in C, which aborts the process before anything is cleaned up.
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except ray.exceptions.RayError as error:
        # An offramp error raised in a worker is both, and says itself what to do.
        if isinstance(error, OfframpError):
            raise
        raise ConfigError("ray", f"a worker process failed: {_last_words(error)}") from error
    finally:
        with _muted():
            ray.shutdown()


def _muted() -> contextlib.AbstractContextManager[object]:
    # Ray prints the ordered end of Serve's controller as a failed task, from another thread.
    return contextlib.redirect_stdout(io.StringIO())


def require_free(host: str, port: int, field: str = "port") -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        ConfigError: naming the field and the reason.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                field, f"{host}:{port} cannot be used ({error.strerror})", "Choose another"
            ) from error
