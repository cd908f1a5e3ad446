"""The process that clients talk to: HTTP on one side, the pool's workers on the other."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import uvicorn
from ray.util import get_node_ip_address

from offramp.controller.errors import ConfigError
from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.observability.tracing import Spans
from offramp.deploy.http.patience import LimitedConfig, PatientProtocol
from offramp.deploy.serve.fronting.pool_backend import PoolBackend
from offramp.deploy.serve.fronting.wire_messages import WireAddress
from offramp.deploy.serve.fronting.worker_links import WorkerLinks
from offramp.deploy.serve.log_lines import WaitingLines, send_lines
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.worker.spec import freeze_heap

_PAUSE_S = 0.02

CUT_S = 2
"""Seconds in which streams that were told of the end may still send it."""


class Front:
    """A Ray actor that listens from its beginning on, and says "starting" until it is connected.

    Args:
        config: What the pool is made of.
    """

    def __init__(self, config: PoolConfig) -> None:
        self._limits = config.limits
        self._lines = WaitingLines()
        send_lines(config.log_format, "front", self._lines.add)
        self._links = WorkerLinks()
        self._backends = {
            model.name: PoolBackend(model, config.clients, self._links) for model in config.models
        }
        self._spans = Spans.to(config.otlp_endpoint) if config.otlp_endpoint else None
        settings = LimitedConfig(
            create_app(
                list(self._backends.values()), config.limits, config.access_log, self._spans
            ),
            host=config.host,
            port=config.port,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(config.limits.idle_s),
            timeout_graceful_shutdown=CUT_S,
        )
        settings.limits = config.limits
        self._server = uvicorn.Server(settings)
        self._serving: asyncio.Task[None] | None = None
        self._wire: WireAddress | None = None
        self._is_listening = asyncio.Event()

    async def listen(self) -> None:
        """Return once clients are answered.

        Raises:
            ConfigError: somebody else took the port meanwhile.
        """
        self._wire = await self._links.listen(get_node_ip_address())
        self._serving = asyncio.create_task(self._serve())
        while not self._server.started:
            if self._serving.done():
                raise ConfigError("port", "cannot be listened on any more", "Choose another")
            await asyncio.sleep(_PAUSE_S)
        freeze_heap()
        self._is_listening.set()

    async def _serve(self) -> None:
        with contextlib.suppress(SystemExit):  # that uvicorn ends the process with
            await self._server.serve()

    async def wire(self) -> WireAddress:
        """Where it listens for workers, as soon as clients are answered."""
        await self._is_listening.wait()
        if self._wire is None or self._serving is None or self._serving.done():
            raise RuntimeError("nobody listens to clients any more")
        return self._wire

    async def connect(self, model: PoolModel, app: str) -> None:
        """Send a model's requests from now on to the workers of an application."""
        await self._backends[model.name].connect(app, model)

    async def hear(self, model: str, report: dict[str, Any]) -> None:
        """Take what a worker of a model says of itself."""
        self._backends[model].hear(report)

    async def log(self, line: str) -> None:
        """Take a line that a worker logged."""
        self._lines.add(line)

    async def lines(self) -> list[str]:
        """What was logged since the last call, as soon as it is something."""
        return await self._lines.fetch()

    async def drain(self) -> None:
        """Refuse what comes from now on, let what is under way end, and stop listening."""
        backends = self._backends.values()
        for backend in backends:
            backend.is_draining = True
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._limits.drain_s
        while any(each.load()[0] for each in backends) and loop.time() < end_s:
            await asyncio.sleep(_PAUSE_S)
        for backend in backends:
            backend.abandon()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        await self._lines.emptied(CUT_S)
