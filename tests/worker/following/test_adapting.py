"""Between releases: audits of a real model's traffic move a worker among certified settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.release.registry import InMemoryRegistry
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import PolicySnapshot, Request
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.following.worker_state import WorkerState
from support.models import REFERENCE
from support.releases.adaptable import POLICY, SETTINGS, moved_to, released
from support.releases.channel import Bench
from support.rows import drain

CODE = ("def main(", "import os\nimport", "class A:\n    def __init__(self", "for i in range(")
CALM = SamplingParams(max_tokens=40, ignore_eos=True)
HOT = replace(CALM, temperature=2.0)
PATIENCE = 40


class MovingWorker:
    """A worker that may move, its engine, and what its requests did."""

    def __init__(self, bench: Bench, worker: PolicyRefresher) -> None:
        self.bench, self.worker = bench, worker
        self.rows: dict[str, Sequence] = {}  # of requests that ended, in that order
        self.engine = AdaptiveEngine.from_pretrained(
            REFERENCE,
            slots=4,
            current_policy=lambda: worker.current,
            config=EngineConfig(audit_share=1.0),
        )

    def round(self, sampling: SamplingParams, seed: int) -> None:
        sampling = replace(sampling, seed=seed)
        self.finish(*[self.engine.submit(text, sampling) for text in CODE])

    def finish(self, *requests: Request) -> None:
        """Step until they have ended, whoever else runs."""
        while not {each.id for each in requests} <= self.rows.keys():
            self.engine.step(self.rows)

    def until(self, setting: float, sampling: SamplingParams) -> None:
        """Send traffic until new requests run at a setting."""
        for seed in range(PATIENCE):
            if self.worker.current.setting == setting:
                return
            self.round(sampling, seed)
        raise AssertionError((setting, self.worker.current.setting, self.worker.report))


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[MovingWorker]:
    bench = Bench(InMemoryRegistry(), tmp_path)
    head = released(bench)
    bench.publisher.promote(head.generation)
    worker = bench.worker()
    worker.poll_once()
    yield MovingWorker(bench, worker)
    worker.stop()


def told(worker: PolicyRefresher) -> tuple[int, int, int]:
    """At which point a worker says that it stands, of how many, and its moves."""
    [tally] = worker.poll_once().tallies
    return tally.point, tally.points, tally.moves


def test_traffic_that_disagrees_moves_it_to_safety_and_back(moving: MovingWorker) -> None:
    assert told(moving.worker) == (3, 3, 0)
    pinned = moving.engine.submit(CODE[0], replace(CALM, max_tokens=200))
    moving.until(SETTINGS[1], HOT)
    assert told(moving.worker) == (2, 3, 1)
    assert (pinned.snapshot.setting, pinned.snapshot.policy) == (SETTINGS[2], POLICY)
    moving.until(SETTINGS[2], CALM)
    assert told(moving.worker) == (3, 3, 2)
    for seed in range(2):
        moving.round(CALM, seed)  # there is nothing faster that is certified
    assert told(moving.worker) == (3, 3, 2)
    moving.finish(pinned)

    rows = [*moving.rows.values()]
    assert {row.request.snapshot.setting for row in rows} == set(SETTINGS[1:])
    again = AdaptiveEngine.from_pretrained(REFERENCE, slots=1)
    for row in (moving.rows[pinned.id], *rows[:2], *rows[-14:-12], *rows[-1:]):
        request, setting = row.request, row.request.snapshot.setting
        assert setting is not None
        alone = PolicySnapshot(0, "", replace(POLICY, threshold=setting))
        repeated = again.submit(request.prompt, request.sampling, alone, kv_mode=request.kv_mode)
        [replay] = drain(again, [repeated])
        assert (replay.emitted, replay.exit_layers) == (row.emitted, row.exit_layers)


def test_a_restart_goes_on_at_the_setting_that_audits_had_moved_to(tmp_path: Path) -> None:
    bench = Bench(InMemoryRegistry(), tmp_path)
    head = released(bench)
    bench.publisher.promote(head.generation)
    first = bench.worker()
    first.poll_once()
    moved_to(first, SETTINGS[0])
    alone = Bench(InMemoryRegistry(), tmp_path).worker()  # there is nobody to ask
    assert (alone.current.generation, alone.current.setting) == (1, SETTINGS[0])
    assert alone.current.policy == replace(POLICY, threshold=SETTINGS[0])
    alone.stop()
    again = bench.worker()
    assert told(again) == (1, 3, 0)  # still there, and not a move
    again.stop()
    # No setting but one that this release's certificate bounds: what else is noted is passed over.
    state = WorkerState(bench.state_dir)
    for number, digest, setting in (
        (1, head.digest, 0.1),
        (1, "f" * 64, SETTINGS[0]),
        (2, head.digest, SETTINGS[0]),
    ):
        state.keep_setting(number, digest, setting)
        assert restarted(bench) == SETTINGS[-1]
    (bench.state_dir / "setting").write_bytes(b"torn")
    assert restarted(bench) == SETTINGS[-1]
    # A new release begins as it was published, though it is of the same policy.
    moved_to(bench.worker(), SETTINGS[1])
    bench.publisher.promote(released(bench).generation)
    for _ in range(2):
        worker = bench.worker()
        assert told(worker) == (3, 3, 0)
        assert (worker.current.generation, worker.current.setting) == (2, SETTINGS[-1])
        worker.stop()


def restarted(bench: Bench) -> float | None:
    """The setting that a worker begins at."""
    worker = bench.worker()
    worker.stop()  # in order: no start counts as a crash
    return worker.current.setting


def test_without_the_signed_guardrail_it_stays_where_it_was_published(tmp_path: Path) -> None:
    bench = Bench(InMemoryRegistry(), tmp_path)
    bench.publisher.promote(released(bench, guardrails={"max_disagreement": 0.9}).generation)
    worker = bench.worker()
    assert worker.poll_once().tallies[0].points == 0
    watch = worker.current.watch
    assert watch is not None
    for _ in range(50):
        watch.judge(False, SETTINGS[2])
    assert worker.current.setting == SETTINGS[2]  # and says so to each request
    worker.stop()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certificate": None, "uncertified": True}, "no two certified settings to move between"),
        ({"guardrails": {"adapt_above": 0.1}}, "0.1 is not below max_disagreement, 0.1"),
        ({"guardrails": {"adapt_above": 1.5}}, "1.5 is not a number in"),
    ],
)
def test_a_range_that_is_none_is_refused_before_it_is_signed(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    bench = Bench(InMemoryRegistry(), tmp_path)
    with pytest.raises(ConfigError, match=said) as refused:
        released(bench, **changes)
    assert refused.value.field == "adapt_above"
