"""A whole run: its files, and that stopping and resuming does not change a byte of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offramp.agents.recording.documents import Document
from offramp.agents.training.resuming import CHECKPOINT
from offramp.agents.tuning import tune as tune_module
from offramp.agents.tuning.quality import TuneReport
from offramp.agents.tuning.state_feed import STATES
from offramp.agents.tuning.stream import WindowStream, data_digest
from offramp.agents.tuning.tune import PLOT, tune
from offramp.agents.tuning.tune_config import TuneConfig
from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.errors import ConfigError, FieldError, TraceError
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.model.adapter_layers import fresh_layer
from offramp.worker.model.families import stack_for
from offramp.worker.model.loading import load_model, model_fingerprint
from offramp.worker.model.translators import ExitTranslators
from support.models import REFERENCE, make_model
from support.recordings import make_corpus

CONFIG = TuneConfig(
    model=str(REFERENCE),
    documents=None,
    exits=(3, 6),
    rank=4,
    steps=6,
    batch_tokens=128,
    length=32,
    held_out=3,
    candidates=8,
    checkpoint_every=2,
)


PROMPT = [5, 17, 33, 2, 41]
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)


class Stopped(Exception):
    """The run was killed."""


def stop_after(steps: int, batch_tokens: int = CONFIG.batch_tokens) -> object:
    def on_progress(stage: str, done: int, *_: object) -> None:
        if stage == "tune" and done == steps * batch_tokens:
            raise Stopped

    return on_progress


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    return replace(CONFIG, corpus=make_corpus(tmp_path_factory.mktemp("corpus") / "documents"))


@pytest.fixture(scope="module")
def whole(config: TuneConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneReport]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, tune(config, folder)


def test_a_run_leaves_what_decoding_needs(whole: tuple[Path, TuneReport]) -> None:
    folder, report = whole
    model = load_model(REFERENCE, torch.bfloat16, "cpu")
    loaded = ExitTranslators.load(folder, model_fingerprint(model), 12, 256, torch.bfloat16, "cpu")
    assert loaded.exits == (3, 6)
    table = np.load(folder / "candidates.npy")
    assert (table.shape, table.dtype) == ((4096, 8), np.int32)
    assert (folder / PLOT).read_bytes().startswith(b"\x89PNG")
    described = json.loads((folder / DESCRIPTION).read_text())
    assert described["rank"] == 4
    assert described["dtype"] == "float32"
    assert len(described["data"]) == 64
    assert [row["layer"] for row in described["report"]["before"]] == [3, 6, 12]
    assert report.tokens == 32 * report.documents > 0
    assert report.before[-1] == report.after[-1], "full depth changed"
    assert report.before[0] != report.after[0]


def test_a_resumed_run_writes_the_same_bytes(
    config: TuneConfig, whole: tuple[Path, TuneReport], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        tune(config, tmp_path, on_progress=stop_after(3))  # type: ignore[arg-type]  # between two checkpoints
    assert not (tmp_path / WEIGHTS).exists()
    tune(config, tmp_path, resume=True)
    for name in (WEIGHTS, DESCRIPTION, "candidates.npy"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name


@pytest.mark.parametrize(
    ("field", "changes"),
    [("rank", {"rank": 8}), ("lr", {"learning_rate": 1e-2}), ("data", {"documents": 20})],
)
def test_other_settings_do_not_resume(
    config: TuneConfig, whole: tuple[Path, TuneReport], field: str, changes: dict[str, object]
) -> None:
    with pytest.raises(ConfigError) as caught:
        tune(replace(config, **changes), whole[0], resume=True)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\x80\x04."])
def test_a_foreign_folder_does_not_resume(
    config: TuneConfig, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / CHECKPOINT).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        tune(config, tmp_path, resume=True)
    assert caught.value.field == "resume"


def test_divergence_is_named(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "backward_from", lambda *_: {3: 0.5, 6: float("nan")})
    with pytest.raises(ConfigError) as caught:
        tune(config, tmp_path)
    assert caught.value.field == "lr"
    assert "exit 6" in caught.value.problem


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rank", {"rank": 0}),
        ("rank", {"rank": 257}),
        ("steps", {"steps": 0}),
        ("lr", {"learning_rate": 0.0}),
        ("lr", {"learning_rate": float("nan")}),
        ("lr", {"learning_rate": 1e300}),
        ("loss", {"loss": "mse"}),
        ("batch_tokens", {"batch_tokens": 100}),
        ("batch_tokens", {"length": 1}),
        ("length", {"length": 2048, "batch_tokens": 2048}),
        ("exits", {"exits": (12,)}),
        ("exits", {"exits": (6, 3)}),
        ("candidates", {"candidates": 5000}),
        ("dtype", {"dtype": "int8"}),
        ("device", {"device": "tpu"}),
        ("limit", {"documents": 2}),
        ("states_gb", {"states_gb": float("nan")}),
    ],
)
def test_unusable_options_are_named(
    config: TuneConfig, tmp_path: Path, field: str, changes: dict[str, object]
) -> None:
    with pytest.raises(FieldError) as caught:
        tune(replace(config, **changes), tmp_path / "out")  # type: ignore[arg-type]
    assert caught.value.field == field
    assert not (tmp_path / "out").exists()


DOCUMENTS = [Document.of(chr(ord("a") + i) * (3 * i + 1), f"{i}.py") for i in range(5)]


def stream(documents: Sequence[Document] = DOCUMENTS, separator: int | None = 0) -> WindowStream:
    return WindowStream(
        documents,
        lambda document: [ord(c) for c in document.text],
        separator,
        rows=2,
        length=4,
        seed=0,
    )


def test_rows_read_whole_documents_each_once_a_pass() -> None:
    windows = stream()
    rows = torch.cat([windows.next() for _ in range(40)], dim=1)
    read = [chr(token) for row in rows.tolist() for token in row]
    parts = [part for part in "".join(read).split("\0") if part]
    texts = {document.text for document in DOCUMENTS}
    whole = [part for part in parts if part in texts]
    assert len(parts) - len(whole) <= 4, "documents are torn only where a row begins or ends"
    counts = [whole.count(text) for text in texts]
    assert max(counts) - min(counts) <= 2


def test_a_stream_goes_on_from_its_position() -> None:
    first, second = stream(), stream()
    for _ in range(7):
        first.next()
    second.seek(json.loads(json.dumps(first.position)))
    assert all(torch.equal(first.next(), second.next()) for _ in range(20))


def test_passes_differ_in_order() -> None:
    windows = stream()
    batches = [windows.next().tolist() for _ in range(30)]
    assert any(batches[i : i + 5] != batches[:5] for i in range(5, 25))


def test_no_documents_and_no_tokens_are_named() -> None:
    with pytest.raises(TraceError):
        stream([])
    with pytest.raises(TraceError):
        stream([Document.of("", "empty.py")], separator=None).next()


def test_the_data_digest_tells_the_documents_and_their_use_apart() -> None:
    a, b = DOCUMENTS[:2]
    digests = {data_digest([a], [b]), data_digest([b], [a]), data_digest([a, b], [])}
    assert len(digests) == 3
    assert data_digest([a, b], []) == data_digest([b, a], [])


def test_a_time_limit_sets_the_steps_once(config: TuneConfig, tmp_path: Path) -> None:
    hurried = replace(config, minutes=1e-9)
    first = tune(hurried, tmp_path / "out")
    assert [point[0] for point in first.curve] == [0]
    assert json.loads((tmp_path / "out" / DESCRIPTION).read_text())["steps"] == 1
    assert tune(replace(config, minutes=99), tmp_path / "out", resume=True) == first


def test_layers_are_trained_resumed_and_served(config: TuneConfig, tmp_path: Path) -> None:
    tokens = 512  # a step; the second pass reads the states of the first
    layers = replace(
        config, corpus=make_corpus(tmp_path / "few", documents=8), kind="layer", exits=(3,),
        steps=12, checkpoint_every=6, batch_tokens=tokens, length=128,
    )  # fmt: skip
    report = tune(layers, tmp_path / "whole")
    before, after = report.before[0], report.after[0]
    losses = [point[1] for point in report.curve]
    assert losses[-1] < losses[0]
    assert (before.layer, after.layer) == (3, 3)
    assert report.before[-1] == report.after[-1], "full depth changed"
    with pytest.raises(Stopped):
        tune(layers, tmp_path / "cut", on_progress=stop_after(7, tokens))  # type: ignore[arg-type]
    assert (tmp_path / "cut" / STATES).exists()
    tune(layers, tmp_path / "cut", resume=True)
    for name in (WEIGHTS, DESCRIPTION):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((tmp_path / "whole" / DESCRIPTION).read_text())["keeps_states"]
    assert not list(tmp_path.glob(f"*/{STATES}"))
    engine = AdaptiveEngine.from_pretrained(
        REFERENCE, slots=1, config=EngineConfig(translators=tmp_path / "whole")
    )
    assert engine.decoder.translators.exits == (3,)
    [full] = engine.generate([PROMPT], SAMPLING)
    [drafted] = engine.generate([PROMPT], SAMPLING, FixedExit(3), kv_mode="verify")
    assert drafted.token_ids == full.token_ids
    assert drafted.stats.drafts > 0


@pytest.mark.parametrize(("inner", "shared"), [(0, True), (64, False)])
def test_layers_may_be_narrow_and_one_may_serve_all_exits(
    config: TuneConfig, tmp_path: Path, inner: int, shared: bool
) -> None:
    layers = replace(
        config, corpus=make_corpus(tmp_path / "few", documents=8), kind="layer", exits=(3, 6),
        steps=6, batch_tokens=512, length=128, inner=inner, shared=shared,
    )  # fmt: skip
    report = tune(layers, tmp_path / "out")
    assert report.curve[-1][1] < report.curve[0][1]
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert {name.split(".")[0] for name in kept} == ({"shared"} if shared else {"3", "6"})
    downs = [tensor for name, tensor in kept.items() if name.endswith("down_proj.weight")]
    assert {tensor.shape[1] for tensor in downs} == {max(inner, 32)}
    assert all(bool(tensor.any()) is (inner > 0) for tensor in downs)
    engine = AdaptiveEngine.from_pretrained(
        REFERENCE, slots=1, config=EngineConfig(translators=tmp_path / "out")
    )
    [full] = engine.generate([PROMPT], SAMPLING)
    for exit_layer in (3, 6):
        [drafted] = engine.generate([PROMPT], SAMPLING, FixedExit(exit_layer), kv_mode="verify")
        assert drafted.token_ids == full.token_ids
        assert drafted.stats.drafts > 0


def test_narrow_and_shared_are_refused_where_they_mean_nothing(config: TuneConfig) -> None:
    bad: dict[str, Any]
    for bad in ({"inner": 64}, {"shared": True}):
        with pytest.raises(ConfigError, match="--kind layer"):
            replace(config, **bad)
    stack = stack_for(load_model(str(REFERENCE), torch.float32, "cpu"))
    for inner in (-32, 33, 1 << 20):
        with pytest.raises(ConfigError, match=r"^inner: .* Try "):
            fresh_layer(stack, inner)
    other = stack_for(make_model("gpt2"))
    with pytest.raises(ConfigError, match="gate_proj"):
        fresh_layer(other, 32)
