"""A pool and collectors on a Ray cluster of two nodes, of which one is lost and replaced."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.stopping_problem import StoppingProblem
from offramp.agents.onpolicy.collector import CollectSpec
from offramp.agents.onpolicy.learner import Learner, LearnerConfig
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig, make_tasks
from offramp.agents.onpolicy.pool import CollectorPool
from offramp.controller.features import CANDIDATES_V1
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.spec import WorkerSpec
from support.pools.ray_node import RayNode, alive_nodes
from support.pools.served_pool import (
    PATIENCE_S,
    ROOT,
    SLOTS,
    STREAMS,
    Outcome,
    ServedPool,
    body,
    follow,
    ready,
    run,
    streams,
)
from support.training_sets import agent, data, problem

__all__ = ["agent", "data", "problem"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

CPUS = 3
"""Of each node: two for a collector, so that no node takes both, and one for a worker."""

DOCUMENTS = [(f"{n:064x}", tuple(range(100 + n, 180 + n))) for n in range(4)]
CONFIG = OnPolicyConfig(rounds=1, documents=4, together=2, tokens=40, prompt_tokens=8, collectors=2)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[RayNode]]:
    """Two, which this process has joined; tests may add more."""
    nodes = [RayNode(1, CPUS)]
    try:
        join(nodes[0])
        nodes.append(RayNode(2, CPUS, nodes[0].address))
        await_nodes(2)
        yield nodes
    finally:
        ray.shutdown()
        for node in reversed(nodes):
            node.kill()


def join(head: RayNode) -> None:
    """Join a cluster as soon as it is there."""
    end_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            ray.init(address=head.address, logging_level="ERROR", log_to_driver=False)
            return
        except ConnectionError:
            assert head.is_up
            assert time.monotonic() < end_s


def await_nodes(count: int) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while alive_nodes() != count:
        assert time.monotonic() < end_s
        time.sleep(0.1)


@pytest.fixture
def collectors(
    nodes: list[RayNode], agent: JumpAgent, problem: StoppingProblem
) -> Iterator[CollectorPool]:
    worker = WorkerSpec(model=str(ROOT / "models" / "reference"), slots=2, threads=1)
    spec = CollectSpec(worker=worker, exits=(3, 6, 9), schema=CANDIDATES_V1, prompt_tokens=8)
    table = successor_table([list(tokens) for _, tokens in DOCUMENTS], 4096, 16)
    pool = CollectorPool(spec, table, size=2, cpus=CPUS - 1)
    pool.start()
    pool.publish(Learner(agent, problem, LearnerConfig(batch=128), configure(None, [])).policy())
    yield pool
    pool.stop()


@pytest.fixture
def served(nodes: list[RayNode], collectors: CollectorPool, tmp_path: Path) -> Iterator[ServedPool]:
    address = nodes[0].address
    with ServedPool(tmp_path / "home", {"--slots": SLOTS}, ray_address=address) as pool:
        yield pool


def pids(collectors: CollectorPool) -> set[int]:
    return {ray.get(actor.describe.remote())[1] for actor in collectors.actors}


def shares(nodes: list[RayNode], collectors: CollectorPool) -> list[tuple[int, int]]:
    """Workers and collectors of each node."""
    theirs = pids(collectors)
    return [
        (len(node.replicas()), sum(each.pid in theirs for each in node.family())) for node in nodes
    ]


def test_a_lost_node_takes_its_own_streams_and_another_takes_its_place(
    nodes: list[RayNode], collectors: CollectorPool, served: ServedPool
) -> None:
    tasks = make_tasks(DOCUMENTS, (0.1, 1.0), CONFIG)
    assert shares(nodes, collectors) == [(1, 1), (1, 1)]
    collected = collectors.collect(tasks, 4)

    async def scenario(client: httpx.AsyncClient) -> tuple[list[Outcome], list[Outcome]]:
        await ready(client)
        outcomes, asked = await streams(client, 400)
        nodes.pop().kill()
        late = [Outcome() for _ in range(STREAMS)]
        await asyncio.gather(*(follow(client, each, body(5)) for each in late))
        await asyncio.gather(*asked)
        return outcomes, late

    outcomes, late = run(served, scenario)
    assert all(each.is_whole and each.tokens == 5 for each in late), late
    assert all(each.is_whole or each.is_told for each in outcomes), outcomes
    assert {each.is_whole for each in outcomes} == {True, False}

    await_nodes(len(nodes))  # until Ray knows, the collector that is left does all the work
    nodes.append(RayNode(3, CPUS, nodes[0].address))
    await_nodes(len(nodes))
    collected += collectors.collect(tasks, 4)
    assert collectors.counts.respawned == 1
    assert len({(each.task, each.document) for each in collected}) == len(collected) >= 8
    run(served, ready)  # both workers answer
    assert shares(nodes, collectors) == [(1, 1), (1, 1)]
