"""The trace store: what goes in comes out, and damage is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import TokenTraces, TraceStore
from offramp.envs.traces.store import open_traces


@pytest.fixture
def store(tmp_path: Path, header: TraceHeader, make_chunk: Callable[..., TraceChunk]) -> TraceStore:
    store = TraceStore.create(tmp_path / "traces", header)
    store.append(make_chunk("a", seed=1), "train")
    store.append(make_chunk("b", seed=2, tokens=7), "test")
    store.append(make_chunk("c", seed=3), "train")
    return store


def assert_same(left: TokenTraces, right: TokenTraces) -> None:
    assert left.header == right.header
    assert left.documents == right.documents
    for field in dataclasses.fields(TokenTraces):
        if field.name in ("header", "documents"):
            continue
        a, b = getattr(left, field.name), getattr(right, field.name)
        np.testing.assert_array_equal(a, b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


def edit_manifest(store: TraceStore, change: Callable[[dict[str, Any]], Any]) -> None:
    path = store.folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_hidden_states_come_back_and_are_all_or_nothing(
    tmp_path: Path, header: TraceHeader, make_chunk: Callable[..., TraceChunk]
) -> None:
    rng = np.random.default_rng(4)
    plain = make_chunk("a")
    state_TED = rng.normal(size=(20, 3, 16)).astype(np.float16)
    chunk = dataclasses.replace(plain, state_TED=state_TED)
    wide = dataclasses.replace(header, width=16, translators="ab")
    store = TraceStore.create(tmp_path / "traces", wide)
    store.append(chunk, "train")
    found = TraceStore.open(store.folder).read()
    assert found.header == wide
    np.testing.assert_array_equal(found.state_NED, state_TED)
    with pytest.raises(TraceError, match="hidden states of 0 columns, not 16"):
        store.append(make_chunk("b"), "train")
    with pytest.raises(TraceError, match="only in part"):
        TokenTraces.from_chunks(wide, [chunk, plain])
    with pytest.raises(TraceError, match="state_TED"):
        dataclasses.replace(chunk, state_TED=np.full_like(state_TED, np.inf))


def test_round_trip_of_every_split(
    store: TraceStore, header: TraceHeader, make_chunk: Callable[..., TraceChunk]
) -> None:
    a, b, c = make_chunk("a", seed=1), make_chunk("b", seed=2, tokens=7), make_chunk("c", seed=3)
    opened = TraceStore.open(store.folder)
    assert opened.header == header
    assert_same(opened.read("train"), TokenTraces.from_chunks(header, [a, c]))
    assert_same(opened.read("test"), TokenTraces.from_chunks(header, [b]))
    assert_same(opened.read(), TokenTraces.from_chunks(header, [a, b, c]))
    opened.verify()


def test_manifest_says_what_lies_in_the_folder(store: TraceStore) -> None:
    raw = json.loads((store.folder / "manifest.json").read_text())
    assert raw["version"] == 2
    assert raw["header"]["exits"] == [2, 4, 7]
    assert [(c["rows"], c["document"], c["split"]) for c in raw["chunks"]] == [
        (20, "a", "train"),
        (7, "b", "test"),
        (20, "c", "train"),
    ]
    for entry in raw["chunks"]:
        content = (store.folder / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]


def test_chunks_are_zstd_with_fixed_size_lists(store: TraceStore) -> None:
    file = pq.ParquetFile(store.folder / store.chunks[0].name)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert pa.types.is_fixed_size_list(file.schema_arrow.field("features_TEF").type)
    assert file.schema_arrow.field("gap_TE").type.list_size == 3


def test_appending_goes_on_after_opening(
    store: TraceStore, make_chunk: Callable[..., TraceChunk]
) -> None:
    again = TraceStore.open(store.folder)
    again.append(make_chunk("d", seed=4), "train")
    assert len(TraceStore.open(store.folder).read("train")) == 60


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip_a_byte, "checksum"), (truncate, "checksum"), (remove, "cannot be read")],
)
def test_a_damaged_chunk_is_named_with_a_remedy(
    store: TraceStore, damage: Callable[[Path], None], words: str
) -> None:
    name = store.chunks[2].name
    damage(store.folder / name)
    for act in (store.read, store.verify, lambda: store.read("train")):
        with pytest.raises(TraceError, match=words) as caught:
            act()
        assert name in str(caught.value)
        assert "record again" in caught.value.remedy
    assert len(store.read("test")) == 7, "a split without the damage stays readable"


def replace_chunk(store: TraceStore, content: bytes) -> None:
    path = store.folder / store.chunks[0].name
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(store, lambda raw: raw["chunks"][0].update(sha256=digest))


def test_a_chunk_that_is_no_parquet_file_is_named(store: TraceStore) -> None:
    replace_chunk(store, b"not parquet")
    with pytest.raises(TraceError, match="no Parquet file"):
        TraceStore.open(store.folder).verify()


def test_a_chunk_with_other_columns_is_named(store: TraceStore) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"position_T": [1, 2]}), sink)
    replace_chunk(store, bytes(sink.getvalue()))
    with pytest.raises(TraceError, match="of another kind"):
        TraceStore.open(store.folder).verify()


def test_a_chunk_with_other_rows_is_named(store: TraceStore) -> None:
    edit_manifest(store, lambda raw: raw["chunks"][0].update(rows=19))
    with pytest.raises(TraceError, match="20 rows, not 19"):
        TraceStore.open(store.folder).verify()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere.*does not exist"):
        TraceStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(version=99), "version 99, not 2"),
        (lambda raw: raw.update(version=1), "version 1, not 2. Record again"),
        (lambda raw: raw.pop("version"), "version None"),
        (lambda raw: raw["header"].update(schema="f" * 64), "unknown feature schema"),
        (lambda raw: raw.pop("header"), "header: Field required"),
        (lambda raw: raw["chunks"][0].update(name="../secret"), r"chunks\.0\.name"),
    ],
)
def test_an_unfit_manifest_is_named(
    store: TraceStore, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    edit_manifest(store, change)
    with pytest.raises(TraceError, match=words) as caught:
        TraceStore.open(store.folder)
    assert caught.value.remedy


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_garbled_manifest_is_named(store: TraceStore, content: bytes) -> None:
    (store.folder / "manifest.json").write_bytes(content)
    with pytest.raises(TraceError, match=r"manifest\.json"):
        TraceStore.open(store.folder)


def test_empty_store_and_empty_split(
    tmp_path: Path, header: TraceHeader, store: TraceStore
) -> None:
    empty = TraceStore.create(tmp_path / "empty", header)
    empty.verify()
    with pytest.raises(TraceError, match="holds no chunk"):
        empty.read()
    with pytest.raises(TraceError, match=r"split 'validation' \(it has \['test', 'train'\]\)"):
        store.read("validation")


def test_create_refuses_an_existing_store_and_an_unknown_schema(
    tmp_path: Path, store: TraceStore, header: TraceHeader
) -> None:
    with pytest.raises(TraceError, match="already holds"):
        TraceStore.create(store.folder, header)
    with pytest.raises(TraceError, match="unknown feature schema"):
        TraceStore.create(tmp_path / "x", dataclasses.replace(header, schema="other"))
    assert not (tmp_path / "x").exists()


def test_append_refuses_what_does_not_fit(
    store: TraceStore, make_chunk: Callable[..., TraceChunk]
) -> None:
    with pytest.raises(TraceError, match="no token"):
        store.append(make_chunk("e", tokens=0), "train")
    with pytest.raises(TraceError, match=r"\(2, 11\), not \(3, 11\)"):
        store.append(make_chunk("e", exits=2), "train")
    assert len(store.chunks) == 3


def test_a_document_never_lies_on_both_sides_of_a_split(
    store: TraceStore, make_chunk: Callable[..., TraceChunk]
) -> None:
    with pytest.raises(TraceError, match="already lies in 'train'"):
        store.append(make_chunk("a"), "test")
    store.append(make_chunk("a", seed=9), "train")


@pytest.mark.parametrize("failing_rename", [1, 2], ids=["chunk", "manifest"])
def test_a_failed_write_leaves_the_store_as_it_was(
    store: TraceStore,
    make_chunk: Callable[..., TraceChunk],
    monkeypatch: pytest.MonkeyPatch,
    failing_rename: int,
) -> None:
    before = (store.folder / "manifest.json").read_bytes()
    renames = 0
    real_replace = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        nonlocal renames
        renames += 1
        if renames == failing_rename:
            raise OSError(28, "No space left on device")
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(TraceError, match="No space"):
            store.append(make_chunk("d", seed=4), "train")
    assert renames == failing_rename
    assert (store.folder / "manifest.json").read_bytes() == before
    assert not list(store.folder.glob(".*")), "no temporary file stays"
    assert len(store.chunks) == 3
    store.append(make_chunk("d", seed=4), "train")
    assert len(TraceStore.open(store.folder).read()) == 67


def test_exactly_one_source_of_traces(store: TraceStore, traces: TokenTraces) -> None:
    assert open_traces(traces, None, None) is traces
    assert len(open_traces(None, store.folder, "test")) == 7
    for arguments in [(None, None, None), (traces, store.folder, None), (traces, None, "test")]:
        with pytest.raises(ConfigError):
            open_traces(*arguments)
