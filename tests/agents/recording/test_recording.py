"""A recording that is cut off keeps what is whole, and goes on from there. Ray is real."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.agents.recording.corpus import recorded_digests, write_split
from offramp.agents.recording.own_text import OWN_TEXT, OwnText
from offramp.agents.recording.record import RecordReport, record_traces
from offramp.agents.recording.record_config import RecordConfig
from offramp.agents.recording.recording import begin, begun_store
from offramp.agents.recording.training_data import is_whole, load_training_data
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker.recording.recording_actor import TraceRecorderActor
from offramp.worker.spec import WorkerSpec
from support.cost_tables import measured
from support.models import REFERENCE
from support.recordings import make_corpus

pytestmark = pytest.mark.usefixtures("one_recorder")


class Interrupted(Exception):
    """What stops a recording, as Ctrl-C would."""


class LastingRecorder:
    """Hands out one actor again and again: to start one takes longer than what it does here."""

    def __init__(self) -> None:
        self.actor: Any = None

    def remote(self, spec: WorkerSpec) -> Any:
        self.actor = self.actor or TraceRecorderActor.remote(spec)
        return self.actor


@pytest.fixture(scope="module")
def lasting(ray_cluster: None) -> LastingRecorder:
    return LastingRecorder()


@pytest.fixture
def one_recorder(lasting: LastingRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.agents.recording.record.TraceRecorderActor", lasting)
    monkeypatch.setattr("ray.kill", lambda _: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RecordConfig:
    corpus = make_corpus(tmp_path_factory.mktemp("recording") / "corpus")
    return RecordConfig(
        worker=WorkerSpec(model=str(REFERENCE)),
        corpus=corpus,
        tokens_per_document=12,
        candidates=16,
        recorders=1,
        profile_s=3.0,  # long enough for a word on how far it is
    )


def cut_after(config: RecordConfig, folder: Path, tokens: int) -> None:
    def stop(stage: str, done: int, _: int) -> None:
        if stage == "costs" or (stage == "record" and done >= tokens):
            raise Interrupted

    with pytest.raises(Interrupted):
        record_traces(config, folder, stop)


def names(folder: Path) -> list[str]:
    """Of the chunks, which end in the digest of what they hold."""
    return [chunk.name for chunk in TraceStore.open(folder).chunks]


def test_resumed_it_equals_the_uninterrupted_recording(
    config: RecordConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_after(config, tmp_path / "straight", 10**6)
    _is_usable_without_costs(tmp_path / "straight")
    expected = names(tmp_path / "straight")
    folder = tmp_path / "traces"
    with monkeypatch.context() as patch:
        _fill_disk_after(patch, 5)
        with pytest.raises(TraceError, match="No space left") as full:
            record_traces(config, folder)
    assert str(folder) in full.value.field
    held = names(folder)
    assert 0 < len(held) < len(expected)
    assert not is_whole(folder)
    seen: dict[str, list[tuple[int, int]]] = {"record": [], "costs": []}
    report = record_traces(config, folder, lambda stage, *count: seen[stage].append(count))
    assert names(folder) == expected
    assert seen["record"][0][0] > len(held) * 12
    assert seen["record"][-1] == (len(expected) * 12,) * 2
    assert seen["costs"]
    assert report.tokens == (len(expected) - len(held)) * 12
    assert is_whole(folder)
    assert len(load_training_data(folder).train) > 0
    _leaves_a_finished_one_alone(config, folder)


def _leaves_a_finished_one_alone(config: RecordConfig, folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    report: RecordReport = record_traces(config, folder)
    assert report.tokens == 0
    with pytest.raises(TraceError, match="begun with candidates = 16, not 8"):
        record_traces(replace(config, candidates=8), folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def _is_usable_without_costs(folder: Path) -> None:
    """Cut off while costs are measured, it is whole but for them."""
    assert not is_whole(folder)
    with pytest.raises(TraceError, match="Run the same `offramp record` again"):
        load_training_data(folder)
    model = TraceStore.open(folder).header.model
    save_costs(folder.parent / "costs.json", measured(model=model))
    found = load_training_data(folder, folder.parent / "costs.json")
    assert len(found.train) > len(found.validation) > 0
    assert recorded_digests(folder)


def test_only_the_same_recording_is_resumed(config: RecordConfig, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    cut_after(config, folder, 30)
    held = names(folder)
    for other, told in (
        (replace(config, exits=(2, 4)), r"begun with exits = \[3, 6, 9\], not \[2, 4\]"),
        (
            replace(config, worker=replace(config.worker, dtype="bfloat16")),
            "begun with dtype = float32",
        ),
        (replace(config, corpus=make_corpus(tmp_path / "fewer", 20)), "other candidates"),
    ):
        with pytest.raises(TraceError, match=told):
            record_traces(other, folder)
    assert names(folder) == held
    cut_after(config, folder, 60)
    assert names(folder)[: len(held)] == held
    assert len(names(folder)) > len(held)


def test_a_recording_that_kept_nothing_is_removed(config: RecordConfig, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    with pytest.raises(ConfigError, match="exits"):
        record_traces(replace(config, exits=(99,)), folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="candidates"):
        record_traces(replace(config, candidates=9999), folder)
    assert not folder.exists()


def test_own_text_is_recorded_from_its_prompts_on_and_kept_when_cut_off(
    config: RecordConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "traces"
    begin(folder, {"documents": 3})
    header = TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(1,), layers=4)
    TraceStore.create(folder, header)  # as if killed right then, before a document was whole
    own = replace(config, own_text=OwnText(prompt_share=0.25))
    cut_after(own, folder, 1)
    store = TraceStore.open(folder)
    assert store.header.exits == (3, 6, 9)
    assert store.header.text == "the model's own, greedy"
    assert store.chunks[0].rows == 9, "three of thirteen tokens are the document's"
    assert store.read().full_right_N.all(), "full depth says what the text says"
    written = (folder / OWN_TEXT).read_bytes()
    cut_after(own, folder, 10)
    assert (folder / OWN_TEXT).read_bytes() == written
    with pytest.raises(TraceError, match=r"begun with own_text = .*, not None"):
        record_traces(config, folder)


def test_files_of_others_are_left_alone(config: RecordConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TraceError, match="something else than a recording"):
        record_traces(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def _fill_disk_after(patch: pytest.MonkeyPatch, chunks: int) -> None:
    real, written = os.replace, 0

    def replace_(source: str | Path, target: str | Path) -> None:
        nonlocal written
        written += str(target).endswith(".parquet")
        if written > chunks:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    patch.setattr(os, "replace", replace_)


def test_a_full_disk_under_what_lies_beside_the_chunks_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: begin(tmp_path, {}),
        lambda: save_candidates(tmp_path, np.zeros((2, 2), np.int32)),
        lambda: write_split([], tmp_path / "split.json"),
        lambda: begun_store(
            tmp_path,
            TraceHeader(model="m", schema=CANDIDATES_V1.digest, exits=(1,), layers=4),
            np.zeros((2, 2), np.int32),
            [],
        ),
    ):
        with pytest.raises(TraceError, match="No space left"):
            write()
    assert not list(tmp_path.iterdir())
