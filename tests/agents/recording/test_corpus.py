from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.agents.recording.corpus import (
    SPLITS,
    TRAIN_SHARE,
    VALIDATION_SHARE,
    Document,
    load_corpus,
    split_of,
    write_split,
)
from offramp.controller.errors import TraceError


def write_texts(folder: Path, count: int = 60) -> Path:
    for number in range(count):
        (folder / f"{number:03}.py").write_text(f"# {number}\n" * 10)
    return folder


@pytest.fixture(scope="module")
def library() -> list[Document]:
    return load_corpus(None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_texts(tmp_path)


def load_small(folder: Path, limit: int | None = None) -> list[Document]:
    return load_corpus(folder, limit, min_chars=10)


def test_the_standard_library_is_a_corpus_with_the_declared_shares(library: list[Document]) -> None:
    shares = Counter(document.split for document in library)
    assert len(library) > 300
    assert shares["train"] / len(library) == pytest.approx(TRAIN_SHARE, abs=0.06)
    assert shares["validation"] / len(library) == pytest.approx(VALIDATION_SHARE, abs=0.06)


def test_the_standard_library_comes_without_tests_or_packages(library: list[Document]) -> None:
    folders = {part for document in library for part in Path(document.path).parts[:-1]}
    assert "asyncio" in folders
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages"})


def test_library_documents_are_long_enough_and_have_no_long_line(library: list[Document]) -> None:
    assert min(len(document.text) for document in library) >= 2000
    assert max(len(line) for each in library for line in each.text.splitlines()) <= 400


def test_a_document_is_named_by_its_content(library: list[Document]) -> None:
    document = library[0]
    assert document.digest == hashlib.sha256(document.text.encode()).hexdigest()
    assert not Path(document.path).is_absolute()


def test_order_is_by_digest_and_a_limit_is_its_beginning(library: list[Document]) -> None:
    digests = [document.digest for document in library]
    assert digests == sorted(digests)
    assert load_corpus(None, limit=50) == library[:50]


def test_a_limited_corpus_keeps_every_split(library: list[Document]) -> None:
    # Fails when order and split read the same digits: the beginning would be all "train".
    assert {document.split for document in library[:60]} == set(SPLITS)


@given(st.text(), st.text(), st.text())
def test_the_split_depends_on_the_content_alone(text: str, path: str, other: str) -> None:
    assert Document.of(text, path).split == Document.of(text, other).split


@given(st.binary(min_size=32, max_size=32))
def test_every_digest_has_a_split(digest: bytes) -> None:
    assert split_of(digest.hex()) in SPLITS


def test_adding_files_never_moves_another(folder: Path) -> None:
    before = {document.digest: document.split for document in load_small(folder)}
    for number in range(200, 260):
        (folder / f"{number}.txt").write_text(f"new {number}\n" * 10)
    after = {document.digest: document.split for document in load_small(folder)}
    assert len(after) == len(before) + 60
    assert before.items() <= after.items()


def test_a_folder_is_read_recursively_by_suffix(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "note.txt").write_text("a note, long enough")
    (folder / "deep" / "image.bin").write_text("another kind of file")
    paths = {document.path for document in load_small(folder)}
    assert len(paths) == 61
    assert "deep/er/note.txt" in paths


def test_equal_contents_count_once_under_the_first_path(folder: Path) -> None:
    (folder / "zzz.py").write_text((folder / "000.py").read_text())
    paths = [document.path for document in load_small(folder)]
    assert len(paths) == 60
    assert "zzz.py" not in paths


@pytest.mark.parametrize(
    "content",
    [b"short", b"x" * 401, b"\xff\xfe not UTF-8, but long enough"],
    ids=["short", "long line", "undecodable"],
)
def test_unusable_files_are_left_out(folder: Path, content: bytes) -> None:
    (folder / "odd.py").write_bytes(content)
    assert "odd.py" not in {document.path for document in load_small(folder)}


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_unreadable_files_are_left_out(folder: Path) -> None:
    (folder / "broken.py").symlink_to(folder / "nowhere")
    (folder / "folder.py").mkdir()
    assert len(load_small(folder)) == 60


def test_the_split_is_recorded_by_digest(folder: Path) -> None:
    documents = load_small(folder)
    record = folder / "runs" / "split.json"
    write_split(documents, record)
    table = json.loads(record.read_text())
    assert table == {each.digest: {"path": each.path, "split": each.split} for each in documents}


def test_the_record_is_the_same_for_the_same_documents(folder: Path) -> None:
    first, second = folder / "first.json", folder / "second.json"
    documents = load_small(folder)
    write_split(documents, first)
    write_split(reversed(documents), second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("count", [0, 1])
def test_a_corpus_without_every_split_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(TraceError, match="Add ") as caught:
        load_small(write_texts(tmp_path, count))
    assert caught.value.field == "corpus"


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="standard library") as caught:
        load_corpus(tmp_path / "nowhere")
    assert caught.value.field == "corpus"


@pytest.mark.parametrize("limit", [-1, 0, 2])
def test_a_limit_below_one_document_per_split_is_refused(folder: Path, limit: int) -> None:
    with pytest.raises(TraceError, match="3 or more") as caught:
        load_small(folder, limit)
    assert caught.value.field == "limit"


def test_documents_cross_process_borders(library: list[Document]) -> None:
    assert pickle.loads(pickle.dumps(library[0])) == library[0]
