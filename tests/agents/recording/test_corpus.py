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

from offramp.agents.recording.corpus import load_corpus, write_split
from offramp.agents.recording.documents import (
    SPLITS,
    TRAIN_SHARE,
    VALIDATION_SHARE,
    Document,
    encode,
    split_of,
)
from offramp.controller.errors import TraceError
from support.tokenizers import byte_level_tokenizer


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


def write_lines(folder: Path, *lines: object, name: str = "chat.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    )
    return path


TALK = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."}]


def many(number: int = 40) -> list[dict[str, object]]:
    return [{"prompt": f"{n} plus one is ", "completion": f"{n + 1}."} for n in range(number)]


def test_each_line_of_a_jsonl_file_is_a_document(folder: Path) -> None:
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "it."}]
    spoken = {"prompt": [{"role": "user", "content": parts}], "completion": TALK[1:]}
    write_lines(folder, {"messages": TALK}, "", {"text": "short"}, spoken, *many())
    found = {each.path: each for each in load_corpus(folder, min_chars=10)}
    assert len(found) == 60 + 43
    assert found["chat.jsonl:1"].turns == (("user", "What is 2 + 2?"), ("assistant", "4."))
    assert found["chat.jsonl:3"].text == "short"
    assert found["chat.jsonl:4"].turns[0] == ("user", "Say\nit.")
    assert found["chat.jsonl:5"].text == "0 plus one is 1."


def test_a_line_ends_where_json_lines_do(tmp_path: Path) -> None:
    odd = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    documents = load_corpus(write_lines(tmp_path, odd, *many()))
    assert "one\u2028two\x85three" in {each.text for each in documents}


def test_one_file_is_a_corpus_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path, *many())
    (tmp_path / "other.txt").write_text("not asked for\n" * 40)
    assert len(load_corpus(path)) == 40


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no JSON object"),
        ({"question": "?", "answer": "!"}, "but question, answer"),
        ({"messages": []}, "no list of role and content"),
        ({"messages": ["hello"]}, "no object of role and content"),
        (
            {"messages": [{"role": "robot", "content": "beep"}]},
            "the role 'robot', not one of system",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "a message of user without text"),
        ({"messages": [{"role": "user"}]}, "a message of user without text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is no text",
        ),
        ({"prompt": "two", "completion": TALK}, "no list of role and content"),
        ({"text": 3}, "has none of messages"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: object, said: str) -> None:
    path = write_lines(tmp_path, *many(5), line)
    with pytest.raises(TraceError, match=r"chat\.jsonl:6") as caught:
        load_corpus(path)
    assert said in str(caught.value)
    assert "messages, prompt with completion, or text" in str(caught.value)


def test_what_is_left_out_is_counted_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "table.py").write_text("x = " + "1" * 500)
    (folder / "latin.txt").write_bytes(b"\xff" * 300)
    (folder / "twice.py").write_text((folder / "000.py").read_text())
    (folder / "paragraph.txt").write_text("a paragraph is one long line " * 40)
    with caplog.at_level("WARNING"):
        found = load_corpus(folder, min_chars=10)
        assert load_corpus(folder, min_chars=10) == found
    assert "paragraph.txt" in {each.path for each in found}
    [said] = [record.getMessage() for record in caplog.records]
    for reason in ("1 not UTF-8", "1 with a line over 400 characters", "1 repeated"):
        assert reason in said
    assert "61 documents" in said


def test_an_error_says_why_nothing_is_left(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.py").write_text("pass\n" * number)
    with pytest.raises(TraceError, match="3 shorter than 200 characters"):
        load_corpus(tmp_path)


def test_a_conversation_is_encoded_by_the_models_template() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    talk = Document.of_turns([(turn["role"], turn["content"]) for turn in TALK], "a:1")
    expected = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert encode(tokenizer, talk) == expected
    assert encode(tokenizer, talk) != encode(tokenizer, Document.of(talk.text, "a:2"))
    tokenizer.chat_template = None
    with pytest.raises(TraceError, match="a:1 does not fit the model's chat template"):
        encode(tokenizer, talk)
