"""Collectors as Ray actors: some die in mid-run, and the run goes on."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.stopping_problem import StoppingProblem
from offramp.agents.onpolicy.collector import CollectSpec
from offramp.agents.onpolicy.learner import Learner, LearnerConfig
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig, make_tasks, run_onpolicy
from offramp.agents.onpolicy.pool import CollectorPool
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.spec import WorkerSpec

pytestmark = pytest.mark.usefixtures("ray_cluster")

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
EXITS = (3, 6, 9)
DOCUMENTS = [(f"{n:064x}", tuple(range(100 + n, 180 + n))) for n in range(4)]
CONFIG = OnPolicyConfig(
    rounds=3, documents=4, together=2, tokens=40, prompt_tokens=8, collectors=2, max_lag=3
)
SPEC = CollectSpec(
    worker=WorkerSpec(model=str(REFERENCE), slots=2),
    exits=EXITS,
    schema=CANDIDATES_V1,
    prompt_tokens=8,
)
TABLE = successor_table([list(tokens) for _, tokens in DOCUMENTS], 4096, 16)


@pytest.fixture
def learner(agent: JumpAgent, problem: StoppingProblem) -> Learner:
    return Learner(agent, problem, LearnerConfig(batch=128), configure(None, []))


def kill(pool: CollectorPool, count: int) -> None:
    for actor in pool.actors[:count]:
        _, pid = ray.get(actor.describe.remote())
        os.kill(pid, signal.SIGKILL)


def test_the_run_goes_on_when_collectors_are_killed(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[CollectorPool] = []
    start = CollectorPool.start

    def starting(pool: CollectorPool) -> None:
        pools.append(pool)
        start(pool)

    monkeypatch.setattr(CollectorPool, "start", starting)
    rounds: list[dict[str, float]] = []

    def on_round(number: int, summary: dict[str, float]) -> None:
        rounds.append(summary)
        if number == 1:
            kill(pools[0], 1)  # which waits its turn: the task in hand is lost, or the next one

    run_onpolicy(learner, SPEC, TABLE, DOCUMENTS, (0.1, 1.0), CONFIG, on_round)
    assert learner.version == 4
    assert len(rounds) == 3
    assert pools[0].counts.respawned == pools[0].counts.reissued == 1
    assert pools[0].counts.rollouts >= 12
    assert all(np.isfinite(list(summary.values())).all() for summary in rounds)
    assert pools[0].actors == []


def test_lost_tasks_come_back_once_and_stale_ones_are_dropped(learner: Learner) -> None:
    pool = CollectorPool(SPEC, TABLE, size=2, max_lag=0)
    pool.start()
    try:
        pool.publish(learner.policy())
        tasks = make_tasks(DOCUMENTS, (0.1, 1.0), CONFIG)
        kill(pool, 1)
        first = pool.collect(tasks, 8)
        lost = 0  # the first task went to the collector that was killed
        for _ in range(100):
            if lost in {each.task for each in first}:
                break  # its new collector has loaded its engine by now
            first += pool.collect(tasks, 1)
        assert pool.counts.reissued == 1
        learner.version += 1  # the other collector is still at work on version 1
        pool.publish(learner.policy())
        fresh = pool.collect(tasks, 4)
    finally:
        pool.stop()
    assert lost in {rollout.task for rollout in first}
    pairs = [(rollout.task, rollout.document) for rollout in first]
    assert len(set(pairs)) == len(pairs)
    assert {rollout.version for rollout in fresh} == {2}
    assert pool.counts.stale == 2


def test_more_collectors_than_the_cluster_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="collectors: 9 with 1 CPUs each do not fit into 2"):
        CollectorPool(SPEC, TABLE, size=9, max_lag=0).start()


def test_tasks_are_numbered_from_0() -> None:
    tasks = make_tasks(DOCUMENTS, (0.1, 1.0), CONFIG)
    assert [task.number for task in itertools.islice(tasks, 3)] == [0, 1, 2]
