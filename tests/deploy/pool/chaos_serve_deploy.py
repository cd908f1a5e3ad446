"""A pool that `serve deploy` starts on a Ray cluster: grown, hurt, changed and shut down."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from offramp.deploy.serve.publishing import public_key_path
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.settings import Settings
from support.pools.ray_node import RayNode
from support.pools.served_pool import (
    PATIENCE_S,
    ROOT,
    SLOTS,
    Outcome,
    body,
    follow,
    free_port,
    ready,
    run,
    streams,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WORKER = "ServeReplica:offramp:reference"


@dataclass
class Deployed:
    """An application of Ray Serve that is a pool.

    Attributes:
        node: The cluster.
        dashboard: Where applications are deployed.
        file: What was deployed last.
        told: The same as objects.
    """

    node: RayNode
    dashboard: str
    file: Path
    told: dict[str, Any]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.told['applications'][0]['args']['port']}"

    def serve(self, *words: str) -> str:
        """What Ray Serve's own command says."""
        command = [str(Path(sys.executable).parent / "serve"), *words, "--address", self.dashboard]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self) -> None:
        self.file.write_text(yaml.safe_dump(self.told))
        self.serve("deploy", str(self.file))

    def status(self) -> tuple[str, str]:
        """State of the application, and what Ray Serve says of it."""
        found = yaml.safe_load(self.serve("status"))["applications"]["offramp"]
        return found["status"], found["message"]

    async def processes(self, words: str, count: int) -> set[int]:
        """Numbers of those so named, once there are so many."""
        end_s = time.monotonic() + PATIENCE_S
        while len(found := {each.pid for each in self.node.named(words)}) != count:
            assert time.monotonic() < end_s, found
            await asyncio.sleep(0.1)
        return found


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployed")
    home, port = folder / "home", free_port()
    with EmbeddedRedis(folder / "redis") as redis:
        settings = {"OFFRAMP_HOME": str(home), "REDIS_URL": redis.url}
        key = public_key_path(Settings.from_environment(settings))
        node = RayNode(1, cpus=2, dashboard=port, environment=settings)
        try:
            told = yaml.safe_load((ROOT / "deploy/kuberay/pool.yaml").read_text())
            (application,) = told["applications"]
            own = {"model": str(ROOT / "models/reference"), "trust": str(key), "slots": SLOTS}
            application["args"] |= own | {"host": "127.0.0.1", "port": free_port(), "drain": 20}
            application["deployments"][0]["num_replicas"] = 1
            dashboard = f"http://127.0.0.1:{port}"
            await_answer(f"{dashboard}/api/version", node)
            pool = Deployed(node, dashboard, folder / "pool.yaml", told)
            yield pool
        finally:
            node.kill()


def await_answer(url: str, node: RayNode) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while True:
        assert node.is_up
        assert time.monotonic() < end_s
        with suppress(httpx.TransportError):
            httpx.get(url, timeout=PATIENCE_S)
            return
        time.sleep(0.2)


async def well(client: httpx.AsyncClient) -> None:
    """Return once KubeRay would send clients."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        with suppress(httpx.TransportError):
            if (await client.get("/-/healthz")).status_code == 200:
                return
        assert time.monotonic() < end_s
        await asyncio.sleep(0.1)


async def whole(client: httpx.AsyncClient, tokens: int = 100) -> None:
    outcomes, asked = await streams(client, tokens)
    await asyncio.gather(*asked)
    assert all(each.is_whole and each.tokens == tokens for each in outcomes), outcomes


def test_what_cannot_be_served_is_said_by_serve_status(pool: Deployed) -> None:
    args = pool.told["applications"][0]["args"]
    args["modle"] = "x"
    pool.deploy()
    end_s = time.monotonic() + PATIENCE_S
    while (said := pool.status())[0] != "DEPLOY_FAILED":
        assert time.monotonic() < end_s, said
        time.sleep(0.5)
    assert "args: modle: is no option of a pool" in said[1]
    del args["modle"]


def test_a_file_starts_a_pool_and_another_size_leaves_its_front(pool: Deployed) -> None:
    pool.deploy()

    async def scenario(client: httpx.AsyncClient) -> None:
        await well(client)
        await whole(client)
        fronts = await pool.processes("ray::Front", 1)
        (workers,) = pool.told["applications"][0]["deployments"]
        workers["num_replicas"] = 2
        outcomes, asked = await streams(client, 400)
        await asyncio.to_thread(pool.deploy)
        await pool.processes(WORKER, 2)
        await asyncio.gather(*asked)
        assert all(each.is_whole for each in outcomes), outcomes
        await ready(client)  # both have reported
        assert await pool.processes("ray::Front", 1) == fronts

    run(pool, scenario)
    assert pool.status()[0] == "RUNNING"


def test_a_lost_front_comes_back_to_the_same_workers(pool: Deployed) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        workers = await pool.processes(WORKER, 2)
        (front,) = pool.node.named("ray::Front")
        _, asked = await streams(client, 900)
        front.kill()
        lost = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, httpx.TransportError) for each in lost), lost
        await well(client)
        await ready(client)
        await whole(client)
        assert await pool.processes(WORKER, 2) == workers

    run(pool, scenario)


def test_an_entrance_that_is_lost_takes_its_front_and_no_worker(pool: Deployed) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        workers = await pool.processes(WORKER, 2)
        fronts = await pool.processes("ray::Front", 1)
        (entrance,) = pool.node.named("ServeReplica:offramp:entrance")
        entrance.kill()
        end_s = time.monotonic() + PATIENCE_S
        while {each.pid for each in pool.node.named("ray::Front")} in (fronts, set()):
            assert time.monotonic() < end_s
            await asyncio.sleep(0.1)
        await well(client)
        await ready(client)
        await whole(client)
        assert await pool.processes(WORKER, 2) == workers

    run(pool, scenario)


def test_other_options_and_the_end_let_streams_end(pool: Deployed) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        before = await pool.processes(WORKER, 2)
        pool.told["applications"][0]["args"]["slots"] = SLOTS + 1
        outcomes, asked = await streams(client, 900)
        await asyncio.to_thread(pool.deploy)
        await asyncio.gather(*asked)
        assert all(each.is_whole for each in outcomes), outcomes
        end_s = time.monotonic() + PATIENCE_S
        while {each.pid for each in pool.node.named(WORKER)} & before:
            assert time.monotonic() < end_s
            late = Outcome()
            with suppress(httpx.TransportError):  # nobody listens yet
                await asyncio.wait_for(follow(client, late, body(20)), PATIENCE_S / 4)
                assert late.is_whole or late.status == 503, late
            await asyncio.sleep(0.1)
        await well(client)
        await whole(client)
        outcomes, asked = await streams(client, 900)
        await asyncio.to_thread(pool.serve, "shutdown", "--yes")
        await asyncio.gather(*asked)
        assert all(each.is_whole for each in outcomes), outcomes
        await pool.processes("ray::Front", 0)
        await pool.processes("ServeReplica", 0)

    run(pool, scenario)
