"""A node of a Ray cluster: on this machine, but with an address and processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import ray

from offramp.deploy.serve.serve_app import OF_SERVE
from support.pools.served_pool import free_port

AGENTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
"""Ports of what Ray starts on each node beside itself."""


class RayNode:
    """``ray start`` as a process that stays.

    Args:
        number: Number of the node, from 1 on; it listens at 127.0.0.NUMBER. The first is the head.
        cpus: Cores that it has to give.
        address: The cluster to join; None begins one.
        dashboard: Port of the head's dashboard, which deploys applications; None: there is none.
        environment: Variables of its processes, beside this one's.
    """

    def __init__(
        self,
        number: int,
        cpus: int,
        address: str | None = None,
        dashboard: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if address is None:
            port = free_port()
            self.address = f"127.0.0.{number}:{port}"
            # Not where other clusters of this machine write which was begun last.
            self._folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
            begin = ["--head", f"--port={port}"]
            begin += (
                ["--include-dashboard=false"]
                if dashboard is None
                else [f"--dashboard-port={dashboard}"]
            )
            begin.append(f"--temp-dir={self._folder.name}")
        else:
            self.address = address
            begin = [f"--address={address}"]
        begin += [f"--num-cpus={cpus}", f"--node-ip-address=127.0.0.{number}", "--block"]
        # Where ports are told, a busy machine has not to write in time which it has found.
        begin += [f"--{name}-port={free_port()}" for name in AGENTS]
        self._process = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--disable-usage-stats", *begin],
            # Else it asks for a token, which this process must have had at its start.
            env={**os.environ, **OF_SERVE, "RAY_AUTH_MODE": "disabled", **(environment or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @property
    def is_up(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def family(self) -> list[psutil.Process]:
        """All processes of the node."""
        found: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
        return found

    def replicas(self) -> list[psutil.Process]:
        """Those that are workers of a pool."""
        return self.named("ServeReplica:offramp")

    def named(self, words: str) -> list[psutil.Process]:
        """Those whose command has these words; who has just ended has none."""
        found = []
        for each in self.family():
            with suppress(psutil.NoSuchProcess):
                if words in "".join(each.cmdline()):
                    found.append(each)
        return found

    def kill(self) -> None:
        """End all processes at once, as when a machine loses its power."""
        if not self.is_up:
            return
        everyone = [psutil.Process(self._process.pid), *self.family()]
        for each in everyone:
            each.send_signal(signal.SIGSTOP)  # so that none sees another's end
        for each in everyone:
            each.kill()
        self._process.wait()
        psutil.wait_procs(everyone)


def alive_nodes() -> int:
    """Nodes of the cluster that this process has joined."""
    return sum(node["Alive"] for node in ray.nodes())
