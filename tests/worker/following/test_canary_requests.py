"""Requests of a real engine while a canary runs: each under one release, to its end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.controller.release.redis_registry import RedisRegistry
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.following.refresh import PolicyRefresher
from support.models import LAYERS, make_model
from support.releases.channel import Bench
from support.rows import drain

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
STABLE, CANARY = 2, 3
"""Exits of the two policies: a token says by its exit layer who decided it."""

IDS = [f"client-{number}" for number in range(24)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        registry = RedisRegistry(server.url, "demo")
        yield Bench(registry, tmp_path)
        registry.close()


@pytest.fixture
def worker(bench: Bench) -> PolicyRefresher:
    bench.serve(STABLE)
    bench.release(CANARY)
    bench.publisher.roll_out(50)
    worker = bench.worker()
    worker.poll_once()
    return worker


@pytest.fixture
def engine(worker: PolicyRefresher) -> AdaptiveEngine:
    assert LAYERS > CANARY
    model = make_model("llama")
    return AdaptiveEngine.from_pretrained(model, slots=4, current_policy=lambda: worker.current)


def test_each_request_runs_under_the_release_that_its_id_picks(
    engine: AdaptiveEngine, worker: PolicyRefresher
) -> None:
    requests = [engine.submit([5, 6], GREEDY, split_by=each) for each in IDS]
    expected = [worker.current.track(each).generation for each in IDS]
    assert set(expected) == {1, 3}
    rows = drain(engine, requests)
    assert [set(row.generations) for row in rows] == [{each} for each in expected]
    for row, generation in zip(rows, expected, strict=True):
        # The first token comes from the prompt, at full depth.
        assert set(row.exit_layers[1:]) == {CANARY if generation == 3 else STABLE}
    again = [engine.submit([7], GREEDY, split_by=each) for each in IDS]
    assert [request.snapshot.generation for request in again] == expected


def test_steps_and_rollbacks_leave_requests_under_way_alone(
    bench: Bench, engine: AdaptiveEngine, worker: PolicyRefresher
) -> None:
    requests = [engine.submit([5, 6], GREEDY, split_by=each) for each in IDS]
    pinned = [request.snapshot.generation for request in requests]
    engine.step()
    bench.publisher.roll_out(100)
    worker.poll_once()
    bench.publisher.rollback(to=1)
    worker.poll_once()
    late = engine.submit([5, 6], GREEDY)
    rows = drain(engine, [*requests, late])
    assert [set(row.generations) for row in rows] == [{each} for each in [*pinned, 5]]


def test_prompts_of_one_call_share_a_release(engine: AdaptiveEngine) -> None:
    seen = set()
    for _ in range(20):
        found = {each.stats.generation for each in engine.generate([[5], [6]], GREEDY)}
        assert len(found) == 1
        seen |= found
    assert seen == {1, 3}  # one in a million calls of this test is unlucky
