"""A canary in shadow: requests are repeated under it, and nobody notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.controller.watching.overseer import Overseer
from offramp.controller.watching.steps import Steps
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.following.shadows import ShadowRunner
from support.models import LAYERS, make_model
from support.releases.channel import Bench

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
STEPS = Steps(percents=(0, 5, 100), min_tokens=100, min_requests=10, min_audited=50, max_tokens=100)
ALWAYS = 1 - 1e-9
LATE = LAYERS - 1
CLIENT = [5, 6, 7]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        registry = RedisRegistry(server.url, "demo")
        yield Bench(registry, tmp_path)
        registry.close()


def in_shadow(
    bench: Bench, canary: int, stable: int = LATE, **config: Any
) -> tuple[PolicyRefresher, AdaptiveEngine]:
    """A worker that serves everybody at a late exit, beside a canary in shadow, and its engine."""
    bench.serve(stable)
    # Judged by the steps alone: no worker trips before.
    bench.release(canary, guardrails={"max_disagreement": 0.99})
    bench.publisher.roll_out(STEPS.percents[0])
    worker = bench.worker()
    assert worker.poll_once().state is AckState.ACK
    engine = AdaptiveEngine.from_pretrained(
        make_model("llama"),
        slots=2,
        current_policy=lambda: worker.current,
        config=EngineConfig(**config),
    )
    return worker, engine


def finish(engine: AdaptiveEngine, runner: ShadowRunner) -> dict[str, Sequence]:
    ended: dict[str, Sequence] = {}
    while not engine.is_idle:
        engine.step(ended)
        runner.work()
    return ended


def shadows(ended: dict[str, Sequence]) -> list[Sequence]:
    return [row for row in ended.values() if row.request.is_shadow]


def test_a_bad_canary_never_serves(bench: Bench) -> None:
    """The whole way: a service, its requests, audits, acknowledgements on Redis, analysis."""
    worker, engine = in_shadow(bench, 1, audit_share=0.0)
    runner = ShadowRunner(engine, ALWAYS)
    service = EngineService(engine, after_step=runner.work)
    overseer = Overseer(bench.publisher, bench.registry, trips=1, steps=STEPS)
    served = []

    async def ask() -> str:
        for number in range(200):
            _, events = await service.submit([5, 6, number % 50], GREEDY)
            served.append([event async for event in events])
            worker.poll_once()
            if "rolled back" in (story := overseer.look()) or "again" in story:
                return story
        raise AssertionError(story)

    service.start()
    try:
        story = asyncio.run(ask())
    finally:
        service.stop()
    assert story.startswith("canary 3 in shadow fails: full depth disagrees with ")
    assert {event.generation for events in served for event in events} == {1}
    alone = AdaptiveEngine.from_pretrained(make_model("llama"), slots=2)
    for number, events in enumerate(served):
        [expected] = alone.generate([[5, 6, number % 50]], GREEDY, FixedExit(LATE))
        assert [event.token for event in events] == expected.token_ids


@pytest.mark.parametrize(
    ("canary", "stable", "mode", "found"),
    [(LAYERS, LATE, "project", "no token left early"), (2, LAYERS, "verify", "lossless")],
)
def test_a_good_one_begins_to_serve(
    bench: Bench, canary: int, stable: int, mode: str, found: str
) -> None:
    worker, engine = in_shadow(bench, canary, stable, kv_mode=mode, audit_share=0.0)
    worker.current.canary.watch._trip = lambda _: None  # type: ignore[union-attr]
    runner = ShadowRunner(engine, ALWAYS)
    overseer = Overseer(bench.publisher, bench.registry, trips=1, steps=STEPS)
    assert "in shadow holds: 0 tokens of the canary" in overseer.look()
    story = ""
    for number in range(60):
        engine.submit([5, 6, number], GREEDY)
        finish(engine, runner)
        worker.poll_once()
        if story := overseer.look():
            break
    assert story.startswith(f"canary 3 in shadow passes: {found}, ")
    assert story.endswith("generation 4 serves 5% of the requests")


def test_its_tokens_are_audited_and_the_clients_go_on_unchanged(bench: Bench) -> None:
    worker, engine = in_shadow(bench, 2, audit_share=0.0)
    runner = ShadowRunner(engine, ALWAYS)
    request = engine.submit(CLIENT, GREEDY, split_by="client")
    ended = finish(engine, runner)
    [shadow] = shadows(ended)
    assert shadow.request.prompt == tuple(CLIENT)
    assert shadow.request.audited
    assert set(ended[request.id].generations) == {1}
    stable, canary = worker.poll_once().tallies
    assert (stable.requests, canary.requests) == (1, 1)
    # Those at its end leave before full depth comes by again.
    assert 0 < canary.audited <= canary.early == len(shadow.emitted) - 1 - canary.exits["5"]
    assert stable.audited == 0


def test_it_gives_way_to_whoever_waits(bench: Bench) -> None:
    _, engine = in_shadow(bench, 2)
    runner = ShadowRunner(engine, ALWAYS)
    first = engine.submit(CLIENT, GREEDY)
    while engine.load != (0, 0):
        engine.step()
        runner.work()
    assert not engine.is_idle  # the shadow, which nobody counts
    waiting = [engine.submit(CLIENT, GREEDY) for _ in range(3)]
    engine.step()
    runner.work()
    runs = [engine.is_under_way(each.id) for each in waiting]
    assert (runs, engine.load) == ([True, True, True], (1, 2))
    engine.step()
    assert engine.load == (2, 1)  # in the slot that the shadow left
    assert not engine.is_under_way(first.id)


def test_it_runs_a_share_of_the_time_and_only_while_the_canary_serves_nobody(bench: Bench) -> None:
    worker, engine = in_shadow(bench, 2)
    runner = ShadowRunner(engine, 1e-9)  # the next one is due in years
    for _ in range(3):
        engine.submit(CLIENT, GREEDY)
        ended = finish(engine, runner)
    assert shadows(ended) == []
    bench.publisher.roll_out(5)
    worker.poll_once()
    anew = ShadowRunner(engine, ALWAYS)
    engine.submit(CLIENT, GREEDY)
    assert shadows(finish(engine, anew)) == []


def test_long_prompts_and_lone_tokens_are_not_repeated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = in_shadow(bench, 2)
    runner = ShadowRunner(engine, ALWAYS)
    monkeypatch.setattr("offramp.worker.following.shadows.SHADOW_PROMPT", len(CLIENT) - 1)
    engine.submit(CLIENT, GREEDY)
    assert shadows(finish(engine, runner)) == []
    engine.submit(CLIENT[:1], SamplingParams(max_tokens=1))
    assert shadows(finish(engine, runner)) == []
