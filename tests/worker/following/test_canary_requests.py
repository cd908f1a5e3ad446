"""Requests of a real engine while a canary runs: each under one release, to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.engine_config import EngineConfig
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


def test_each_track_counts_its_own_requests(
    engine: AdaptiveEngine, worker: PolicyRefresher
) -> None:
    requests = [engine.submit([5, 6], GREEDY, split_by=each) for each in IDS]
    rows = drain(engine, requests)
    tallies = {each.generation: each for each in worker.poll_once().tallies}
    assert tallies.keys() == {1, 3}
    for generation, tally in tallies.items():
        mine = [row for row in rows if row.generations[0] == generation]
        exits = Counter(str(layer) for row in mine for layer in row.exit_layers[1:])
        assert tally.exits == exits
        assert tally.tokens == sum(len(row.emitted) - 1 for row in mine) > 0
        assert tally.layers == sum(row.layer_calls for row in mine)
        assert tally.seconds > 0
        assert (tally.requests, sum(tally.firsts)) == (len(mine), len(mine))
        assert sum(tally.gaps) == tally.tokens  # one at a time, but in ``verify``


def test_a_canary_that_talks_garbage_is_rolled_back_by_itself(bench: Bench) -> None:
    """The whole way: real requests, audits, acknowledgements on Redis, analysis, rollback."""
    full = bench.serve(LAYERS)
    canary = bench.release(1, guardrails={"max_disagreement": 0.99})  # so that no worker trips
    bench.publisher.roll_out(50)
    worker = bench.worker()
    worker.poll_once()
    engine = AdaptiveEngine.from_pretrained(
        make_model("llama"),
        slots=4,
        current_policy=lambda: worker.current,
        config=EngineConfig(audit_share=1.0),
    )
    steps = Steps(min_tokens=20, min_audited=20, max_disagreement=0.1, min_speed=0.01)
    overseer = Overseer(bench.publisher, bench.registry, trips=1, steps=steps)
    assert "holds: 0 tokens" in overseer.look()
    # Long enough for full depth to be asked: it is when tokens pend no longer.
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    drain(engine, [engine.submit([5, 6], long, split_by=each) for each in IDS])
    worker.poll_once()
    story = overseer.look()
    assert story.startswith("canary 3 at 50% fails: full depth disagrees with ")
    assert worker.poll_once().digest == full.digest != canary.digest
    assert worker.current.canary is None
