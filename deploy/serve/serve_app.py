"""The Ray Serve pool: each replica is one worker with its own engine and policy refresh."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from offramp.controller.errors import ConfigError, OfframpError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack
from offramp.controller.release.signing import load_public_keys, trusted_keys
from offramp.controller.release.trust import ReleaseVerifier
from offramp.deploy.http.engine_backend import EngineBackend
from offramp.deploy.http.http_app import create_app
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.core import EngineCore
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.following.worker_state import StateClaim
from offramp.worker.model.loading import check_model
from offramp.worker.spec import WorkerSpec, freeze_heap, load_engine

APP = "offramp"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """A pool of workers behind one HTTP address.

    Attributes:
        worker: What each replica loads.
        model_id: Name that clients ask for.
        redis_url: The registry that the workers follow.
        channel: Channel whose releases the workers follow.
        trusted: File with the publisher's public key.
        state_dir: Folder of the workers' own state (marks, last-known-good releases).
        replicas: Number of workers.
        host, port: Where HTTP listens.
        api_key: What clients must present; None asks for none, on loopback only.
        max_waiting: Requests that may wait per worker before new ones get 429.
        poll_s: Seconds between polls of the registry when no event wakes a worker.
        cpus: Cores that Ray sets aside per replica.
    """

    worker: WorkerSpec
    model_id: str
    redis_url: str
    channel: str
    trusted: Path
    state_dir: Path
    replicas: int = 2
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_waiting: int = 64
    poll_s: float = 5.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError("replicas", f"{self.replicas} is below 1")
        if not 0 < self.port < 65536:
            raise ConfigError("port", f"{self.port} is not in [1, 65535]")
        if self.host not in LOOPBACK and self.api_key is None:
            raise ConfigError(
                "host",
                f"{self.host} is reachable from outside, but no key is set",
                "Set OFFRAMP_API_KEY or listen on 127.0.0.1",
            )


class ServedWorker(EngineBackend):
    """One replica: engine thread, policy refresher, HTTP app."""

    def __init__(self, config: PoolConfig) -> None:
        # Held for as long as this process lives: no other worker writes there.
        self._claim = StateClaim(config.state_dir / config.channel)
        self.worker_id = self._claim.name
        self.model_id = config.model_id
        self.api_key = config.api_key
        self.started_at = int(time.time())
        engine = load_engine(config.worker)
        verifier = ReleaseVerifier(
            trusted_keys(*load_public_keys(config.trusted)),
            config.channel,
            engine.model_fingerprint,
            engine.tokenizer_fingerprint,
            layers=engine.stack.layers,
            vocab=engine.stack.vocab,
        )
        self.refresher = PolicyRefresher(
            RedisRegistry(config.redis_url, config.channel),
            verifier,
            self._claim.folder,
            self.worker_id,
            config.poll_s,
            engine.prepare,
        )
        engine.current_policy = lambda: self.refresher.current
        super().__init__(EngineService(engine, max_waiting=config.max_waiting))
        freeze_heap()
        self.refresher.start()
        self.service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after construction."""
        return create_app(self)

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process in order: this is no crash."""
        if refresher := getattr(self, "refresher", None):
            refresher.stop()

    def check_health(self) -> None:
        """Called by Ray Serve: a stuck engine gets its replica replaced."""
        if not self.service.is_healthy:
            raise RuntimeError("the engine makes no progress")

    async def policy_report(self) -> dict[str, Any]:
        """This worker's policy; other workers report through their acknowledgements.

        ``unreported`` says why the registry could not be told of it; "" if it was.
        """
        engine = self.service.engine
        return describe_policy(
            self.worker_id, self.refresher.current, self.refresher.report, engine
        ) | {"unreported": self.refresher.unreported}


def describe_policy(
    worker: str, snapshot: PolicySnapshot, report: Ack, engine: EngineCore
) -> dict[str, Any]:
    """Describe a worker's policy, as ``/v1/policy`` answers.

    ``guarantee`` is "certified", "uncertified" or "full depth"; ``certificate`` the sentence it
    states; ``gap`` why that sentence does not hold for how this worker decodes, "" if it does;
    ``audited`` counts early tokens that full depth was asked about, ``disagreed`` those it
    would not have emitted; ``canary`` describes the release that serves a share of the requests
    (``percent``) in its place, None if there is none.
    """
    canary = snapshot.canary
    return {
        "worker": worker,
        **_describe(snapshot, engine),
        "canary": canary and {"percent": canary.rollout.percent, **_describe(canary, engine)},
        "state": report.state.value,
        "reason": report.reason,
    }


def _describe(snapshot: PolicySnapshot, engine: EngineCore) -> dict[str, Any]:
    certificate = snapshot.certificate
    gap = (
        ""
        if certificate is None
        else certificate.gap(
            kv_mode=engine.config.kv_mode,
            dtype=str(engine.stack.dtype).removeprefix("torch."),
            translators=engine.decoder.translators.digest,
        )
    )
    return {
        "generation": snapshot.generation,
        "digest": snapshot.digest,
        "exits": list(snapshot.policy.exits),
        "guarantee": snapshot.guarantee,
        "certificate": None if certificate is None else certificate.statement,
        "gap": gap,
        "audited": snapshot.watch.audited if snapshot.watch else 0,
        "disagreed": snapshot.watch.disagreed if snapshot.watch else 0,
    }


ServedWorkerDeployment: Any = serve.deployment(serve.ingress()(ServedWorker))
"""The same as a Ray Serve deployment."""


@contextlib.contextmanager
def running_pool(config: PoolConfig) -> Iterator[str]:
    """Deploy a pool on the current Ray cluster; yields its base URL and shuts it down after.

    Raises:
        ConfigError: the port is taken.
        ModelError: the model folder cannot be served.
    """
    check_model(config.worker.model)
    require_free(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    try:
        deployment = ServedWorkerDeployment.options(
            num_replicas=config.replicas,
            # The app sheds load itself, with OpenAI's error body; Serve's own is plain text.
            max_ongoing_requests=10 * config.max_waiting,
            ray_actor_options={"num_cpus": config.cpus},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        serve.run(deployment.bind(config), name=APP, route_prefix="/")
        yield f"http://{config.host}:{config.port}"
    finally:
        with _muted():
            serve.shutdown()


@contextlib.contextmanager
def ray_session(address: str | None, cpus: int) -> Iterator[None]:
    """Join a Ray cluster, or start a local one; leave it, or stop it, after.

    Raises:
        ConfigError: nobody answers at the address.
    """
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "address": "local"}
    else:
        options["address"] = address
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
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
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError("ray", f"a worker process failed: {reason}") from error
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
