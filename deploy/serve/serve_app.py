"""The Ray Serve pool: workers in replicas, and one front that clients talk to."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import serve

from offramp.controller.errors import ConfigError, OfframpError
from offramp.deploy.serve.fronting.front_keeper import FrontKeeper
from offramp.deploy.serve.placing.pool_growth import tell_shortage
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.worker_deployments import QUIET, require_model, workers_of

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
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    keeper = FrontKeeper(config, f"front-{secrets.token_hex(8)}")
    with contextlib.ExitStack() as stack:
        stack.callback(_shut_down)
        keeper.start()
        stack.callback(keeper.end)
        pool = RunningPool(config, keeper)
        pool.start(config, config.models)
        yield pool


class RunningPool:
    """A pool that serves, and whose workers can be replaced meanwhile.

    Args:
        config: What it is made of.
        front: Keeps what clients talk to.

    Attributes:
        url: Base of its routes.
    """

    def __init__(self, config: PoolConfig, front: FrontKeeper) -> None:
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
        apps = {model.name: _app_of(model, self._turn) for model in models}
        targets = [
            serve.RunTarget(
                workers_of(config, model, self._front.name),
                name=apps[model.name],
                route_prefix=None,
            )
            for model in models
        ]
        try:
            _deploy(targets)
        except BaseException:
            for app in apps.values():
                serve.delete(app)
            raise
        for model in models:
            with contextlib.suppress(ray.exceptions.RayActorError):  # the next front is told, too
                ray.get(self._front.connect(model, apps[model.name]))
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


def _app_of(model: PoolModel, turn: int) -> str:
    """Name a model's application in Ray Serve; each redeploy has its turn."""
    return f"offramp-{model.deployment}-{turn}"


def _deploy(targets: list[serve.RunTarget]) -> None:
    """Start all workers; returns once they are up.

    Raises:
        ConfigError: a worker cannot start, with what it said last.
    """
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        why = _last_words(_told_of(targets)) or _last_words(str(error)) or type(error).__name__
        raise ConfigError("workers", f"none could start: {why}") from error


def _told_of(targets: list[serve.RunTarget]) -> str:
    """What Ray Serve says of deployments that failed, tracebacks included."""
    apps = serve.status().applications
    found = [apps[each.name] for each in targets if each.name in apps]
    return "\n".join(
        each.message
        for app in found
        for each in app.deployments.values()
        if each.status == "DEPLOY_FAILED"
    )


def _last_words(text: str) -> str:
    """What a text that holds another process's traceback says at its end, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    last = (raised or lines or [""])[-1]
    return re.sub(r"^offramp\.[\w.]+: ", "", last).rstrip(".")


def _shut_down() -> None:
    with _muted():
        serve.shutdown()


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
            problem = f"cannot be started here: {_last_words(str(error)) or type(error).__name__}"
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
        raise ConfigError("ray", f"a worker process failed: {_last_words(str(error))}") from error
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
