"""A real pool in trouble: too much work, bad clients, lost workers, and the order to stop.

One pool for all tests of this file, in this order: the last one stops it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offramp.deploy.http.metrics import REPORTED

T = TypeVar("T")

ROOT = Path(__file__).parents[3]
STREAMS = SLOTS = 12  # one worker alone can run them all: they begin at once, wherever they go
WAITING = 8
CAPACITY = 2 * (SLOTS + WAITING)
PATIENCE_S = 120.0
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServedPool:
    """``offramp serve`` as a process of its own."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.redis_port = free_port()
        options = {"--port": self.port, "--redis-port": self.redis_port}
        options |= {"--slots": SLOTS, "--max-waiting": WAITING, "--threads": 1}
        words = [str(word) for option in options.items() for word in option]
        environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "RAY_ADDRESS")}
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "offramp"), "serve", *words],
            cwd=ROOT,
            env=environment | {"OFFRAMP_HOME": str(home)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

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


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    pool = ServedPool(tmp_path_factory.mktemp("pool") / "home")
    try:
        assert pool.process.stdout is not None
        said = []
        for line in pool.process.stdout:
            said.append(line)
            if "Ctrl-C" in line:
                break
        else:
            pytest.fail("".join(said))
        yield pool
    finally:
        if pool.process.poll() is None:
            pool.process.terminate()
            pool.process.wait(PATIENCE_S)


def run(pool: ServedPool, scenario: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def within() -> Any:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(
            base_url=pool.url, timeout=PATIENCE_S, limits=limits
        ) as client:
            return await asyncio.wait_for(scenario(client), 2 * PATIENCE_S)

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
    client: httpx.AsyncClient, tokens: int, count: int = STREAMS
) -> tuple[list[Outcome], list[asyncio.Task[None]]]:
    """Streams that all have begun."""
    outcomes = [Outcome() for _ in range(count)]
    tasks = [asyncio.create_task(follow(client, each, body(tokens))) for each in outcomes]
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


def test_the_official_client_works_unchanged(pool: ServedPool) -> None:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "reference", "max_tokens": 5, "temperature": 0}
        both = client.completions.create(prompt=["import os", "def "], **asked)
        assert [choice.index for choice in both.choices] == [0, 1]
        stream = client.completions.create(prompt="def ", stream=True, **asked)
        assert "".join(each.choices[0].text for each in stream) == both.choices[1].text
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(
                model="reference", messages=[{"role": "user", "content": "hello"}]
            )


def test_prometheus_sees_every_token_and_every_worker(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[str]:
        await ready(client)
        texts = [(await client.get("/metrics")).text]
        # Not ``streams``: one so short may end before another has begun.
        await asyncio.gather(*(follow(client, Outcome(), body(20)) for _ in range(3)))
        return [*texts, (await client.get("/metrics")).text]

    before, after = (
        {family.name: family.samples for family in text_string_to_metric_families(text)}
        for text in run(pool, scenario)
    )
    made = "offramp_generation_tokens"
    assert after[made][0].value - before[made][0].value == 3 * 20
    for name in REPORTED:
        family = after["offramp_" + name.removesuffix("_total")]
        assert len({sample.labels["worker"] for sample in family}) == 2
    assert {sample.labels["guarantee"] for sample in after["offramp_policy_info"]} == {"full depth"}


def test_nothing_listens_where_other_machines_reach_it(pool: ServedPool) -> None:
    open_at = {
        connection.laddr.ip.removeprefix("::ffff:")
        for _, connections in pool.of_each(lambda each: each.net_connections("inet"))
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }
    assert open_at <= {"127.0.0.1", "::1"}


def test_four_hundred_at_once_are_served_or_told_to_come_back(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        outcomes = [Outcome() for _ in range(400)]
        await asyncio.gather(*(follow(client, each, body(20)) for each in outcomes))
        await ready(client)
        return outcomes

    outcomes = run(pool, scenario)
    served = [each for each in outcomes if each.status == 200]
    assert {each.status for each in outcomes} == {200, 429}
    assert len(served) >= CAPACITY
    assert all(each.is_whole and each.tokens == 20 for each in served)


def test_a_client_that_hangs_up_frees_its_place(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        _, tasks = await streams(client, 1000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ready(client)

    run(pool, scenario)


def test_a_body_that_is_too_large_is_not_read(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        told = await client.post("/v1/completions", content=b"[" * 50_000_000, headers=headers)
        assert told.status_code == 413

        async def untold() -> Any:
            for _ in range(10):
                yield b"[" * 2**20

        chunked = await client.post("/v1/completions", content=untold(), headers=headers)
        assert chunked.status_code == 413
        assert set(chunked.json()["error"]) == {"message", "type", "param", "code"}

    run(pool, scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_workers_streams_are_told_and_the_others_go_on(
    pool: ServedPool, number: signal.Signals
) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        await ready(client)
        outcomes, tasks = await streams(client, 400)
        lost = pool.workers()[0]  # of so many streams each has some
        lost.send_signal(number)
        # It has died, or is taken for dead, before long; what comes meanwhile goes elsewhere.
        late = Outcome()
        await follow(client, late, body(5))
        assert late.is_whole
        await asyncio.gather(*tasks)
        while lost.is_running() and lost.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.1)  # until it is replaced
        await ready(client)
        return outcomes

    outcomes = run(pool, scenario)
    assert all(each.is_whole or each.is_told for each in outcomes), outcomes
    assert any(each.is_told for each in outcomes)
    assert any(each.is_whole for each in outcomes)


def test_the_order_to_stop_lets_streams_end_and_refuses_new_ones(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        await ready(client)
        outcomes, tasks = await streams(client, 200)
        pool.process.send_signal(signal.SIGTERM)
        while (await client.get("/ready")).json()["status"] != "draining":
            await asyncio.sleep(0.01)
        pool.process.send_signal(signal.SIGTERM)  # a second one does not interrupt the end
        refused = await client.post("/v1/completions", json=body(5))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        await asyncio.gather(*tasks)
        return outcomes

    outcomes = run(pool, scenario)
    assert all(each.is_whole and each.tokens == 200 for each in outcomes), outcomes
    assert pool.process.wait(PATIENCE_S) == 0
    assert pool.process.stdout is not None
    assert "Traceback" not in pool.process.stdout.read()
    redis = f"127.0.0.1:{pool.redis_port}"
    assert [p for p in psutil.process_iter(["cmdline"]) if redis in str(p.info["cmdline"])] == []
