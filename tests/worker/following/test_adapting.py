"""Between releases: audits of a real model's traffic move a worker among certified settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import ThresholdPolicy
from offramp.controller.release.certificate import Walked
from offramp.controller.release.registry import Ack, Head, InMemoryRegistry
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import PolicySnapshot, Request
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.following.refresh import PolicyRefresher
from support.certificates import certificate
from support.models import REFERENCE
from support.releases.channel import MODEL, TOKENIZER, Bench
from support.rows import drain

SETTINGS = (0.95, 0.5, 0.2)
"""Safest first; the reference model's layer 3 and full depth seldom agree at the last if tokens
are drawn hot."""

POLICY = ThresholdPolicy((3,), SOFTMAX_V2, "margin", SETTINGS[-1])
CODE = ("def main(", "import os\nimport", "class A:\n    def __init__(self", "for i in range(")
CALM = SamplingParams(max_tokens=40, ignore_eos=True)
HOT = replace(CALM, temperature=2.0)
ABOVE = 0.15
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


def released(bench: Bench, **changes: Any) -> Head:
    """A release of the policy, with a certificate of all settings, and bounds."""
    packed = pack_policy(POLICY, np.full((4, SOFTMAX_V2.width), 0.5, np.float32))
    walked = tuple(Walked(setting=each, risk=0.01, p_value=0.001, passed=True) for each in SETTINGS)
    proof = certificate(
        packed.digest,
        walked=walked,
        setting=SETTINGS[-1],
        risk=0.01,
        p_value=0.001,
        parameter="threshold of margin",
    )
    bounds = {"adapt_above": ABOVE, "max_disagreement": 0.9}
    options: dict[str, Any] = {"certificate": proof, "guardrails": bounds}
    return bench.publisher.release(
        packed, model=MODEL, tokenizer=TOKENIZER, training={}, metrics={}, **options | changes
    )


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[MovingWorker]:
    bench = Bench(InMemoryRegistry(), tmp_path)
    head = released(bench)
    bench.publisher.promote(head.generation)
    worker = bench.worker()
    worker.poll_once()
    yield MovingWorker(bench, worker)
    worker.stop()


def told(moving: MovingWorker) -> tuple[int, int, int]:
    """At which point the registry says that the worker stands, of how many, and its moves."""
    moving.worker.poll_once()
    [ack] = moving.bench.registry.acks()
    assert isinstance(ack, Ack)
    [tally] = ack.tallies
    return tally.point, tally.points, tally.moves


def test_traffic_that_disagrees_moves_it_to_safety_and_back(moving: MovingWorker) -> None:
    assert told(moving) == (3, 3, 0)
    pinned = moving.engine.submit(CODE[0], replace(CALM, max_tokens=200))
    moving.until(SETTINGS[1], HOT)
    assert told(moving) == (2, 3, 1)
    assert (pinned.snapshot.setting, pinned.snapshot.policy) == (SETTINGS[2], POLICY)
    moving.until(SETTINGS[2], CALM)
    assert told(moving) == (3, 3, 2)
    for seed in range(2):
        moving.round(CALM, seed)  # there is nothing faster that is certified
    assert told(moving) == (3, 3, 2)
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
