"""A pool of two workers as ``offramp serve`` starts it, and clients of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import httpx
import psutil

T = TypeVar("T")

ROOT = Path(__file__).parents[3]
STREAMS = SLOTS = 12  # one worker alone can run them all: they begin at once, wherever they go
SLACK = SLOTS // 4
WAITING = 8
CAPACITY = 2 * (SLOTS + WAITING)
PATIENCE_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServedPool:
    """``offramp serve`` as a process of its own; in a ``with``, until its end and once it serves.

    Args:
        home: OFFRAMP_HOME.
        options: Options beside the ports; by default those of a pool of two that decodes.
        ray_address: The cluster to join; None starts one.
    """

    def __init__(
        self, home: Path, options: dict[str, Any] | None = None, ray_address: str | None = None
    ) -> None:
        self.port = free_port()
        self.redis_port = free_port()
        environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "RAY_ADDRESS")}
        if ray_address is not None:
            environment["RAY_ADDRESS"] = ray_address
        if options is None:
            options = {"--slots": SLOTS, "--max-waiting": WAITING, "--prefix-cache-mib": 16}
            environment["OFFRAMP_TRAFFIC"] = str(home / "traffic")
        ports = {"--port": self.port, "--redis-port": self.redis_port, "--threads": 1}
        options = {**ports, **options}
        words = [str(word) for option in options.items() for word in option]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "offramp"), "serve", *words],
            cwd=ROOT,
            env=environment | {"OFFRAMP_HOME": str(home)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def await_start(self) -> None:
        """Return once it serves.

        Raises:
            RuntimeError: it ended, with what it said.
        """
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "Ctrl-C" in line:
                return
        raise RuntimeError("".join(said))

    def __enter__(self) -> Self:
        try:
            self.await_start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def family(self) -> list[psutil.Process]:
        """The command's process and all that it started."""
        command = psutil.Process(self.process.pid)
        return [command, *command.children(recursive=True)]

    def of_each(self, ask: Callable[[psutil.Process], T]) -> list[tuple[psutil.Process, T]]:
        """What each says; Ray's helpers come and go, and who is gone says nothing."""
        said = []
        for each in self.family():
            with suppress(psutil.NoSuchProcess):
                said.append((each, ask(each)))
        return said

    def workers(self) -> list[psutil.Process]:
        """The processes of replicas."""
        named = self.of_each(lambda each: "".join(each.cmdline()))
        return [each for each, words in named if "ServeReplica:offramp" in words]


class Addressed(Protocol):
    """A pool that clients reach."""

    @property
    def url(self) -> str:
        """Base of its routes."""


def run(
    pool: Addressed,
    scenario: Callable[[httpx.AsyncClient], Awaitable[Any]],
    within_s: float = 2 * PATIENCE_S,
) -> Any:
    async def within() -> Any:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(
            base_url=pool.url, timeout=PATIENCE_S, limits=limits
        ) as client:
            return await asyncio.wait_for(scenario(client), within_s)

    return asyncio.run(within())


def body(tokens: int, **fields: Any) -> dict[str, Any]:
    asked = {"model": "reference", "prompt": [11, 12], "max_tokens": tokens, "ignore_eos": True}
    return {**asked, "temperature": 0, "stream": True, **fields}


@dataclass(eq=False)
class Outcome:
    """What one stream brought."""

    status: int = 0
    tokens: int = 0
    finish: str | None = None
    error: Any = None
    is_done: bool = False

    @property
    def is_whole(self) -> bool:
        return self.finish == "length" and self.is_done and self.error is None

    @property
    def is_told(self) -> bool:
        """It did not come to its end, and its client was told so."""
        return (
            self.error is not None and self.finish is None and (self.is_done or self.status != 200)
        )

    def note(self, line: str) -> None:
        if line == "data: [DONE]":
            self.is_done = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            self.error = event.get("error")
            for choice in event.get("choices", []):
                self.tokens += 1
                self.finish = choice["finish_reason"]


async def follow(client: httpx.AsyncClient, outcome: Outcome, asked: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        outcome.status = response.status_code
        if response.status_code != 200:
            outcome.error = json.loads(await response.aread())["error"]
            return
        async for line in response.aiter_lines():
            outcome.note(line)


async def streams(
    client: httpx.AsyncClient, tokens: int, prompts: Sequence[Sequence[int]] = ((11, 12),) * STREAMS
) -> tuple[list[Outcome], list[asyncio.Task[None]]]:
    """Streams that all have begun."""
    outcomes = [Outcome() for _ in prompts]
    tasks = [
        asyncio.create_task(follow(client, outcome, body(tokens, prompt=prompt)))
        for outcome, prompt in zip(outcomes, prompts, strict=True)
    ]
    while any(outcome.tokens < 2 for outcome in outcomes):
        assert not any(task.done() for task in tasks), outcomes
        await asyncio.sleep(0.01)
    return outcomes, tasks


async def ready(client: httpx.AsyncClient) -> None:
    """Both workers answer, and nothing is under way."""
    answered: set[str] = set()
    while len(answered) < 2:
        answered.add((await client.get("/v1/policy")).json().get("worker", ""))
        answered.discard("")
        await asyncio.sleep(0.01)
    while (await client.get("/ready")).json() != {"status": "ready", "outstanding": 0}:
        await asyncio.sleep(0.01)
