"""Starts a pool's front, and another one if it is lost."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offramp.controller.errors import OfframpError
from offramp.deploy.serve.fronting.front import Front
from offramp.deploy.serve.fronting.front_link import FRONTS
from offramp.deploy.serve.log_lines import show_line
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel

LOOK_S = 1.0
"""Seconds between two looks whether the front is there."""

PATIENCE_S = 30.0
"""A front that says nothing for so long is given up."""

STOP_S = 15.0
"""Seconds that the front has for its end beyond those for draining."""

_logger = logging.getLogger(__name__)


class FrontKeeper:
    """Keeps a front on this machine: one that is lost takes its streams with it, and no more.

    Args:
        config: What the pool is made of.
        name: Names the front to the pool's workers.
    """

    def __init__(self, config: PoolConfig, name: str) -> None:
        self.name = name
        self._config = config
        self._front: Any = None
        self._connected: dict[str, tuple[PoolModel, str]] = {}
        self._connecting: dict[str, Any] = {}
        self._changing = threading.Lock()
        self._ending = threading.Event()

    def start(self) -> None:
        """Return once clients are answered.

        Raises:
            ConfigError: the port was taken meanwhile.
        """
        end_s = time.monotonic() + STOP_S
        while self._front is None:
            try:
                self._front = self._begun()
            except ActorAlreadyExistsError:  # one of that name has only just been lost
                if time.monotonic() > end_s:
                    raise
                time.sleep(LOOK_S)
        threading.Thread(target=self._keep, daemon=True).start()
        if self._config.log_format is not None:
            threading.Thread(target=self._show_lines, daemon=True).start()

    def connect(self, model: PoolModel, app: str) -> Any:
        """Send a model's requests from now on to the workers of an application.

        Returns:
            What ``ray.get`` waits with until one of them is up.
        """
        with self._changing:
            self._connected[model.name] = model, app
            connecting = self._connecting[model.name] = self._front.connect.remote(model, app)
        return connecting

    def end(self) -> None:
        """Let requests under way end, and then the front, if there is one."""
        self._ending.set()
        if self._front is None:
            return
        with self._changing:
            try:
                limit_s = self._config.limits.drain_s + STOP_S
                with contextlib.suppress(RayError):
                    ray.get(self._front.drain.remote(), timeout=limit_s)
            finally:
                ray.kill(self._front)

    def _begun(self) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Front).options(
            name=self.name,
            namespace=FRONTS,
            num_cpus=0,
            max_concurrency=1000,
            scheduling_strategy=here,
        )
        front = actor.remote(self._config)
        try:
            ray.get(front.listen.remote(), timeout=PATIENCE_S)
        except BaseException:
            ray.kill(front)
            raise
        return front

    def _keep(self) -> None:
        while not self._ending.wait(LOOK_S):
            try:
                ray.get(self._front.wire.remote(), timeout=PATIENCE_S)
                self._connect_again()
            except Exception as error:  # whatever it is, somebody has to keep a front
                with self._changing:
                    if not self._ending.is_set():
                        why = str(error).partition("\n")[0]
                        _logger.error("the front is lost, and its streams: %s", why)
                        self._replace()

    def _connect_again(self) -> None:
        """Repeat what failed, as when a worker was lost meanwhile."""
        with self._changing:
            for name, connecting in list(self._connecting.items()):
                if not ray.wait([connecting], timeout=0)[0]:
                    continue
                try:
                    ray.get(self._connecting.pop(name))
                except RayError as error:
                    _logger.warning("%s is not connected: %s", name, error)
                    again = self._front.connect.remote(*self._connected[name])
                    self._connecting[name] = again

    def _replace(self) -> None:
        with contextlib.suppress(RayError):
            ray.kill(self._front)
        try:
            self._front = self._begun()
        except (OfframpError, RayError) as error:
            # The port, or in Ray the name, is not free yet: the next look tries again.
            _logger.warning("no front could be started: %s", error)
            return
        for name, (model, app) in self._connected.items():
            self._connecting[name] = self._front.connect.remote(model, app)

    def _show_lines(self) -> None:
        """Show what the pool's processes log, for as long as it runs."""
        while True:
            try:
                for line in ray.get(self._front.lines.remote()):
                    show_line(line)
            except RayError:
                if self._ending.is_set():
                    return
                time.sleep(LOOK_S)
