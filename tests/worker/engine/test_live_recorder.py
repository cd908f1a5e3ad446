"""What is recorded of live traffic: what the policy saw, within bounds, and no text unasked."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.features import (
    CANDIDATES_V1,
    BoolArray,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.deploy.serve.traffic_keeping import KeptTraffic
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.service import EngineService
from offramp.worker.recording.live_recorder import LIVE, MOST_TOKENS, MOST_WAITING, TrafficRecorder
from offramp.worker.recording.recorder import record_document
from offramp.worker.spec import TrafficConfig
from support.models import VOCAB, make_model
from support.rows import RAGGED, drain

EXITS = (2, 4)
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)
TABLE_VK = np.random.default_rng(0).integers(0, VOCAB, size=(VOCAB, 6), dtype=np.int32)
UNBOUNDED = TrafficConfig(folder=Path("unused"), time_share=1 - 1e-9)


@dataclass
class Seeing:
    """Leaves at random at its exits, and remembers what it was shown at the first of them."""

    chance: float = 0.5
    exits: tuple[int, ...] = EXITS
    schema: FeatureSchema = CANDIDATES_V1
    candidates_VK: IntArray = field(default_factory=lambda: TABLE_VK)
    seen: list[FloatArray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        if np.allclose(features_NF[:, CANDIDATES_V1.index("depth")], self.first):
            self.seen += [np.array(row) for row in features_NF]
        return self.rng.random(len(features_NF)) < self.chance

    first: float = EXITS[0] / 5


Kept = list[tuple[TraceHeader, IntArray, TraceChunk]]


def recording(
    config: TrafficConfig = UNBOUNDED, share: float = 1.0
) -> tuple[AdaptiveEngine, TrafficRecorder, Kept]:
    engine = AdaptiveEngine.from_pretrained(
        make_model("llama"), slots=4, config=EngineConfig(audit_share=share)
    )
    kept: Kept = []
    return engine, TrafficRecorder(engine, lambda *each: kept.append(each), config), kept


def watched(policy: Any) -> PolicySnapshot:
    told: list[str] = []
    watch = PolicyWatch(Guardrails(max_disagreement=0.999), told.append)
    return PolicySnapshot(3, "d" * 64, policy, None, watch)


def test_an_audited_request_is_recorded_as_the_policy_saw_it_and_as_record_would() -> None:
    engine, recorder, kept = recording(dataclasses.replace(UNBOUNDED, keep_text=True))
    policy = Seeing()
    prompt = RAGGED[0]
    [row] = drain(engine, [engine.submit(prompt, GREEDY, watched(policy))])
    recorder.work()
    [(header, table_VK, chunk)] = kept
    assert (header.exits, header.schema, header.text) == (EXITS, CANDIDATES_V1.digest, LIVE)
    assert header.model == engine.model_fingerprint
    np.testing.assert_array_equal(table_VK, TABLE_VK)
    tokens = [*prompt, *row.emitted]
    again = record_document(engine.stack, chunk.document, tokens, EXITS, TABLE_VK)
    np.testing.assert_array_equal(chunk.features_TEF, again.features_TEF)
    np.testing.assert_array_equal(chunk.next_token_T, tokens[1:])
    np.testing.assert_array_equal(chunk.full_token_T, again.full_token_T)
    # Live, each token but the first was shown to the policy at its first exit, if full depth's turn
    # had not come; what it saw is what is recorded.
    live_TF = chunk.features_TEF[len(prompt) :, 0]
    assert len(policy.seen) > 12
    for seen_F in policy.seen:
        assert np.abs(live_TF - seen_F).max(axis=1).min() < 1e-4
    assert recorder.recorded == len(chunk)


def test_no_text_is_kept_unless_it_is_asked_for() -> None:
    engine, recorder, kept = recording()
    [row] = drain(engine, [engine.submit(RAGGED[2], GREEDY, watched(Seeing()))])
    recorder.work()
    [(_, _, chunk)] = kept
    # The prompt's rows are gone, and of each position only which tokens are equal is left.
    assert len(chunk) == len(row.emitted) - 1
    assert not chunk.full_token_T.any()
    assert chunk.next_token_T.max() <= 1
    assert chunk.exit_token_TE.max() <= 1 + len(EXITS)
    tokens = [*RAGGED[2], *row.emitted]
    whole = record_document(engine.stack, "", tokens, EXITS, TABLE_VK).after(len(RAGGED[2]))
    columns = [whole.full_token_T[:, None], whole.next_token_T[:, None], whole.exit_token_TE]
    token_TC = np.concatenate(columns, axis=1)
    own = [chunk.full_token_T[:, None], chunk.next_token_T[:, None], chunk.exit_token_TE]
    mine_TC = np.concatenate(own, axis=1)
    for left in range(token_TC.shape[1]):  # all that training asks of tokens
        np.testing.assert_array_equal(
            mine_TC == mine_TC[:, [left]], token_TC == token_TC[:, [left]]
        )
    np.testing.assert_array_equal(chunk.gap_TE, whole.gap_TE)


def test_full_depth_is_recorded_in_the_same_share_once_a_policy_said_how() -> None:
    engine, recorder, kept = recording(share=0.5)
    before = [engine.submit(RAGGED[0], GREEDY, FULL_DEPTH) for _ in range(4)]
    drain(engine, before)
    recorder.work()
    assert kept == []  # nobody has said yet at which exits
    drain(engine, [engine.submit(RAGGED[0], GREEDY, watched(FixedExit(2)))])
    recorder.work()
    assert kept == []  # this one reads no features
    drain(engine, [engine.submit(RAGGED[0], GREEDY, watched(Seeing()))])
    drain(engine, [engine.submit(RAGGED[0], GREEDY, FULL_DEPTH) for _ in range(4)])
    for _ in range(9):
        recorder.work()
    assert len(kept) == 3
    assert {header for header, _, _ in kept} == {kept[0][0]}


def test_its_time_is_bounded_and_the_oldest_that_wait_are_passed_over() -> None:
    engine, recorder, kept = recording(dataclasses.replace(UNBOUNDED, time_share=1e-9))
    snapshot, short = watched(Seeing()), SamplingParams(max_tokens=3, ignore_eos=True)
    drain(engine, [engine.submit(RAGGED[1], short, snapshot) for _ in range(MOST_WAITING + 3)])
    for _ in range(5):
        recorder.work()
    assert len(kept) == 1  # the next one's turn is years away
    assert recorder.passed_over == 3


def test_what_is_too_long_or_says_nothing_is_left_out() -> None:
    engine = AdaptiveEngine.from_pretrained(
        make_model("llama", max_position_embeddings=MOST_TOKENS + 64),
        slots=2,
        config=EngineConfig(audit_share=1.0),
    )
    kept: Kept = []
    recorder = TrafficRecorder(engine, lambda *each: kept.append(each), UNBOUNDED)
    snapshot = watched(Seeing())
    prompt = [5, 9] * (MOST_TOKENS // 2)
    drain(engine, [engine.submit(prompt, SamplingParams(max_tokens=2), snapshot)])
    drain(engine, [engine.submit([5], SamplingParams(max_tokens=1), snapshot)])
    recorder.work()
    assert (len(kept), recorder.passed_over) == (0, 1)
    drain(engine, [engine.submit(prompt[:-4], GREEDY, snapshot)])
    recorder.work()
    assert len(kept[0][2]) == 4  # up to the bound


def test_a_recording_that_fails_is_nothing_to_those_who_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, _, _ = recording()
    alone = drain(engine, [engine.submit(RAGGED[0], GREEDY, watched(Seeing()))])

    def fail(*_: object) -> None:
        raise OSError("no disk")

    recorder = TrafficRecorder(engine, fail, UNBOUNDED)
    [row] = drain(engine, [engine.submit(RAGGED[0], GREEDY, watched(Seeing()))])
    recorder.work()
    assert row.emitted == alone[0].emitted
    assert recorder.passed_over == 1
    assert "was not recorded" in caplog.text


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[EngineService, KeptTraffic]]:
    engine, _, _ = recording()
    snapshot = watched(Seeing())
    engine.current_policy = lambda: snapshot
    config = TrafficConfig(folder=tmp_path, time_share=0.999)
    traffic = KeptTraffic(engine, config, "worker-0-ab")
    service = EngineService(engine, after_step=traffic.work)
    service.start()
    yield service, traffic
    service.stop()


def test_a_served_worker_keeps_stores_that_every_tool_reads(
    served: tuple[EngineService, KeptTraffic], tmp_path: Path
) -> None:
    service, traffic = served

    async def ask() -> list[int]:
        _, events = await service.submit(RAGGED[0], GREEDY)
        return [event.token async for event in events]

    said = [asyncio.run(ask()) for _ in range(3)]
    assert all(len(tokens) == GREEDY.max_tokens for tokens in said)
    service.stop()
    traffic.work()
    traffic.close()
    [folder] = (tmp_path / "worker-0-ab").iterdir()
    found = TraceStore.open(folder).read()
    counts = traffic.counts()
    assert counts is not None
    assert counts["kept"] == len(found.documents) >= 2
    assert counts["recorded_tokens"] == len(found)
    np.testing.assert_array_equal(load_candidates(folder), TABLE_VK)


@pytest.mark.parametrize(("field", "value"), [("most_mb", 0.0), ("time_share", 1.0)])
def test_bounds_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match="traffic_"):
        TrafficConfig(**{"folder": Path("x"), field: value})  # type: ignore[arg-type]
