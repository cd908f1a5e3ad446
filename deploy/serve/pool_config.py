"""What a pool is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from offramp.controller.adapters.adapter_index import MAX_ADAPTER_MB
from offramp.controller.errors import ConfigError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.serve.log_lines import FORMATS
from offramp.deploy.serve.placing.pool_growth import PoolGrowth
from offramp.worker.spec import TrafficConfig, WorkerSpec

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolModel:
    """One model of a pool, and the workers that serve it.

    Attributes:
        worker: What each replica loads.
        heads: Folder of heads that classify: then texts are classified, and no tokens are made.
        labels: Classes that those tell apart, as clients are told.
        name: What clients ask for.
        channel: Channel whose releases the workers follow.
        replicas: Number of workers; of a pool that grows, the fewest.
        growth: How far it grows and shrinks with its load; None: it does not.
        max_waiting: Requests that may wait per worker before new ones get 429.
        cpus: Cores that Ray sets aside per replica; 0: it has room for any number of them.
        traffic: What workers keep of live traffic; None: nothing.

    Raises:
        ConfigError: a number out of range.
    """

    worker: WorkerSpec
    name: str
    channel: str
    heads: Path | None = None
    labels: tuple[str, ...] = ()
    replicas: int = 2
    growth: PoolGrowth | None = None
    max_waiting: int = 64
    cpus: float = 1.0
    traffic: TrafficConfig | None = None

    @property
    def deployment(self) -> str:
        """Name of its workers in Ray Serve."""
        return quote(self.name, safe="")

    @property
    def most_replicas(self) -> int:
        """Workers at most."""
        return self.replicas if self.growth is None else self.growth.most

    @property
    def size(self) -> dict[str, Any]:
        """How many workers Ray Serve is to run, in its words."""
        if self.growth is None:
            return {"num_replicas": self.replicas}
        return {"autoscaling_config": self.growth.serve_config(self.replicas)}

    @property
    def room(self) -> int:
        """Requests that one worker decodes or lets wait."""
        return self.worker.slots + self.max_waiting

    @property
    def slack(self) -> int:
        """Requests that a worker may have more than the idlest, and get those that it knows."""
        return max(1, self.worker.slots // 4)

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError("replicas", f"{self.replicas} is below 1")
        if (self.heads is None) != (not self.labels):
            raise ConfigError("labels", f"{self.labels} are not those of heads {self.heads}")
        if self.growth is not None and self.growth.most < self.replicas:
            raise ConfigError(
                "max_replicas",
                f"{self.growth.most} is below the {self.replicas} workers that there are anyway",
                "Lower --replicas, or leave it out",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """Workers of one model or of several behind one HTTP address.

    Attributes:
        models: What is served.
        redis_url: The registry that the workers follow.
        trusted: File with the publisher's public key.
        state_dir: Folder of the workers' own state (marks, last-known-good releases).
        host, port: Where HTTP listens.
        clients: Tells clients by their keys; without any, only loopback is listened on.
        max_adapter_mb: Most MiB of adapters that a release may bring.
        poll_s: Seconds between polls of the registry when no event wakes a worker.
        limits: Bounds on clients and their requests.
        access_log: File that gets a line of JSON per request; None: nowhere.
        otlp_endpoint: Where spans of requests are sent, as OTLP over HTTP; None: nowhere.
        log_format: How the command shows what all processes log, "text" or "json"; None: not.

    Raises:
        ConfigError: a number out of range, an open address without a key, models that have a name
            in common, or different ones on one channel.
    """

    models: tuple[PoolModel, ...]
    redis_url: str
    trusted: Path
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    clients: ClientKeys = field(default_factory=ClientKeys)
    max_adapter_mb: float = MAX_ADAPTER_MB
    poll_s: float = 5.0
    limits: HttpLimits = field(default_factory=HttpLimits)
    access_log: Path | None = None
    otlp_endpoint: str | None = None
    log_format: str | None = None

    def process_of(self, model: PoolModel, worker: str) -> str:
        """Name a worker in the pool's log."""
        return worker if len(self.models) == 1 else f"{model.name}/{worker}"

    def __post_init__(self) -> None:
        _require_apart(self.models)
        if self.log_format not in (None, *FORMATS):
            known = " or ".join(FORMATS)
            raise ConfigError("log_format", f"{self.log_format!r} is unknown", f"Use {known}")
        if not 0 < self.port < 65536:
            raise ConfigError("port", f"{self.port} is not in [1, 65535]")
        if self.host not in LOOPBACK and not self.clients.are_asked_for:
            raise ConfigError(
                "host",
                f"{self.host} is reachable from outside, but no key is set",
                "Run offramp clients add, set OFFRAMP_API_KEY, or listen on 127.0.0.1",
            )


def _require_apart(models: tuple[PoolModel, ...]) -> None:
    """Refuse names that say nothing, and channels whose releases would fit one model at most."""
    if not models:
        raise ConfigError("models", "holds none", "Name at least one")
    names: set[str] = set()
    served: dict[str, tuple[str, Path | None]] = {}
    for model in models:
        if model.name in names:
            raise ConfigError("models", f"two are named {model.name!r}", "Rename one")
        names.add(model.name)
        loaded = model.worker.model, model.heads
        if served.setdefault(model.channel, loaded) != loaded:
            raise ConfigError(
                "channel",
                f"{model.channel!r} is followed by different models, and a release is for one",
                "Give each a channel of its own",
            )
