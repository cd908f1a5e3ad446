"""``offramp serve`` as a process of its own, and what the system says of it and its children."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from serving.stream_client import StrictClient

STOPPED_IN_S = 90.0
READY_IN_S = 120.0


@dataclass
class ServerProcess:
    """A server under test.

    Attributes:
        process: What was started; it has the others as children.
        client: Asks it.
    """

    process: subprocess.Popen[str]
    client: StrictClient

    def family(self) -> list[psutil.Process]:
        """The process and all that it started."""
        with suppress(psutil.NoSuchProcess):
            command = psutil.Process(self.process.pid)
            return [command, *command.children(recursive=True)]
        return []

    def named(self, part: str) -> list[psutil.Process]:
        """Those of the family whose command lines have a word."""
        found = []
        for each in self.family():
            with suppress(psutil.Error):
                if part in "".join(each.cmdline()):
                    found.append(each)
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes of replicas."""
        return self.named("ServeReplica:offramp")

    def speakers(self) -> list[psutil.Process]:
        """The front, and the workers: those that a token passes through."""
        return [*self.named("ray::Front"), *self.workers()]

    async def idle(self, within_s: float = READY_IN_S, workers: int = 1) -> float:
        """Return once nothing is under way and all workers are counted on; says after how long."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while loop.time() - began_s < within_s:
            with suppress(OSError, ValueError, IndexError, asyncio.IncompleteReadError):
                state = await self.client.get("/ready")
                if state == {"status": "ready", "outstanding": 0} and await self._heard(workers):
                    return loop.time() - began_s
            await asyncio.sleep(0.02)
        return float("nan")

    async def _heard(self, workers: int) -> bool:
        if workers == 1:
            return True
        metrics = await self.client.text("/metrics")
        lines = [x for x in metrics.splitlines() if x.startswith("offramp_num_requests_running{")]
        return len(lines) == workers


def cpu_s(processes: list[psutil.Process]) -> float:
    """Processor seconds that processes have used."""
    spent = 0.0
    for each in processes:
        with suppress(psutil.Error):
            spent += sum(each.cpu_times()[:2])
    return spent


def rss_mb(processes: list[psutil.Process]) -> dict[str, float]:
    """MiB of memory that each process holds, by name and number."""
    found = {}
    for each in processes:
        with suppress(psutil.Error):
            found[f"{each.name()}:{each.pid}"] = each.memory_info().rss / 2**20
    return found


def fds(processes: list[psutil.Process]) -> int:
    """File descriptors that are open."""
    return sum(each.num_fds() for each in processes)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(home: Path | None = None, **options: Any) -> Iterator[ServerProcess]:
    """A pool that takes requests; it is stopped at the end."""
    with TemporaryDirectory() as folder:
        port = free_port()
        options = {"threads": 1, "port": port, "redis_port": free_port()} | options
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "RAY_ADDRESS")}
        environment["OFFRAMP_HOME"] = str(home or Path(folder) / "home")
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "offramp"), "serve", *words],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            await_line(process, "Ctrl-C")
            yield ServerProcess(process, StrictClient(port))
        finally:
            stop(process)


def await_line(process: subprocess.Popen[str], part: str) -> str:
    """Read what a process says up to some words; the line with them.

    Raises:
        RuntimeError: it ended without them.
    """
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if part in line:
            return line
    raise RuntimeError(f"the server did not start: {''.join(said)}")


def stop(process: subprocess.Popen[str]) -> None:
    """Tell a process to end, and see that it does."""
    process.terminate()
    try:
        process.wait(STOPPED_IN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
