"""Losses on the reference model, decoded and replayed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.calibration.calibration_documents import (
    CalibrationDocument,
    calibration_windows,
    data_digest,
    unseen_documents,
)
from offramp.agents.calibration.losses import OnPolicy, Replayed, by_unit
from offramp.agents.recording.corpus import load_corpus
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.follow import follow

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
PROMPT, LENGTH = 16, 41
EXITS = (3, 6, 9)
TABLE_VK = np.tile(np.arange(4, dtype=np.int32), (4096, 1))


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    torch.set_num_threads(1)
    return AdaptiveEngine.from_pretrained(REFERENCE, slots=3)


@pytest.fixture(scope="module")
def documents() -> list[CalibrationDocument]:
    return calibration_windows(str(REFERENCE), load_corpus(None, limit=8), LENGTH, 5)


def test_windows_are_of_the_length_asked_for(documents: list[CalibrationDocument]) -> None:
    assert len(documents) == 5
    assert {len(each.tokens) for each in documents} == {LENGTH}
    assert data_digest(documents) == data_digest(list(documents))
    assert data_digest(documents) != data_digest(documents[:-1])


def test_full_depth_has_no_loss_and_early_exits_have_more(
    engine: AdaptiveEngine, documents: list[CalibrationDocument]
) -> None:
    losses = OnPolicy(engine, documents, PROMPT)
    assert losses.decode_mode == "project"
    risks, shallow = [], ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", 0.3)
    losses.disagreement(shallow)
    shares = losses.leaves(EXITS)
    runs, _ = follow(engine, [each.tokens for each in documents], PROMPT, shallow)
    left = [depth for run in runs for depth in run.exit_layers]
    assert shares == tuple(left.count(depth) / len(left) for depth in EXITS)
    assert 0 < sum(shares) < 1
    for policy in (NeverExit(), FixedExit(9), FixedExit(3)):
        differs = losses.disagreement(policy)
        assert [len(each) for each in differs] == [LENGTH - PROMPT - 1] * 5
        by_document, by_token = by_unit(differs, "document"), by_unit(differs, "token")
        assert len(by_document) == 5
        assert len(by_token) == 5 * (LENGTH - PROMPT - 1)
        assert by_document.mean() == pytest.approx(by_token.mean())
        risks.append(by_document.mean())
    assert risks[0] == 0.0
    assert 0 < risks[1] < risks[2]


def test_a_fixed_exit_replays_as_it_decodes(
    engine: AdaptiveEngine, documents: list[CalibrationDocument]
) -> None:
    # Layers below a fixed exit never read a projected entry, so replay is exact for it alone.
    replayed = Replayed(engine, documents, PROMPT, EXITS, TABLE_VK)
    decoded = OnPolicy(engine, documents, PROMPT)
    for layer in EXITS:
        mine, theirs = (
            replayed.disagreement(FixedExit(layer)),
            decoded.disagreement(FixedExit(layer)),
        )
        for left, right in zip(mine, theirs, strict=True):
            assert np.array_equal(left, right)


def test_replay_promises_more_than_decoding_keeps(
    engine: AdaptiveEngine, documents: list[CalibrationDocument]
) -> None:
    replayed = Replayed(engine, documents, PROMPT, EXITS, TABLE_VK)
    assert replayed.decode_mode == "replay"
    policy = ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", 0.15)
    offline = by_unit(replayed.disagreement(policy), "token").mean()
    online = by_unit(OnPolicy(engine, documents, PROMPT).disagreement(policy), "token").mean()
    assert 0 < offline < online


def test_a_verifying_engine_has_no_loss_to_bound(documents: list[CalibrationDocument]) -> None:
    engine = AdaptiveEngine.from_pretrained(REFERENCE, config=EngineConfig(kv_mode="verify"))
    with pytest.raises(ConfigError, match="kv_mode: verify emits what full depth would"):
        OnPolicy(engine, documents, PROMPT)


def test_only_documents_that_nobody_has_seen_are_used(tmp_path: Path) -> None:
    recorded = load_corpus(None, limit=300)
    table = {each.digest: {"path": each.path, "split": each.split} for each in recorded}
    (tmp_path / "split.json").write_text(json.dumps(table))
    unseen = unseen_documents(None, tmp_path)
    assert unseen
    assert not {each.digest for each in unseen} & table.keys()
    assert "test" not in {each.split for each in unseen}
    everything = {each.digest for each in load_corpus(None) if each.split != "test"}
    assert {each.digest for each in unseen} == everything - table.keys()


def test_a_recording_that_took_everything_leaves_nothing(tmp_path: Path) -> None:
    digests: dict[str, dict[str, str]] = {each.digest: {} for each in load_corpus(None)}
    (tmp_path / "split.json").write_text(json.dumps(digests))
    assert unseen_documents(None, tmp_path) == []
    with pytest.raises(TraceError, match=r"calibration documents: none of 0 .* larger --corpus"):
        calibration_windows(str(REFERENCE), [], LENGTH, 5)


@pytest.mark.parametrize("content", [None, "{", "3"])
def test_a_recording_that_does_not_say_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "split.json").write_text(content)
    with pytest.raises(ConfigError, match=r"traces: .*split\.json is unreadable"):
        unseen_documents(None, tmp_path)
