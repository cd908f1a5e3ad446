"""The model's own text: written in whole batches, kept when cut off, drawn by each document."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.documents import Document
from offramp.agents.recording.own_text import (
    OWN_TEXT,
    TOGETHER,
    Batch,
    OwnText,
    Spoken,
    beginning,
    speak_all,
)
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.model.loading import load_tokenizer
from offramp.worker.recording.going_on import go_on
from support.models import REFERENCE
from support.recordings import make_corpus
from support.tokenizers import byte_level_tokenizer

NEW = 6
SETTINGS = {"temperature": 0.7, "new_tokens": NEW}

Prompts = list[tuple[Document, list[int]]]


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(REFERENCE, slots=TOGETHER)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    documents = load_corpus(make_corpus(tmp_path_factory.mktemp("own") / "corpus"))[:20]
    tokenizer = load_tokenizer(REFERENCE)
    return [(each, beginning(tokenizer, each, 5)) for each in documents]


def speaking(engine: AdaptiveEngine, batches: Iterable[Batch]) -> Iterator[list[list[int]]]:
    for prompts, seeds in batches:
        yield go_on(engine, prompts, NEW, SETTINGS["temperature"], seeds=seeds)


def spoken(engine: AdaptiveEngine, folder: Path, prompts: Prompts, **settings: Any) -> list[Spoken]:
    told = {**SETTINGS, **settings}
    return speak_all(folder / OWN_TEXT, told, prompts, partial(speaking, engine))


def test_cut_off_it_keeps_whole_batches_and_goes_on_to_the_same_text(
    engine: AdaptiveEngine, prompts: Prompts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = spoken(engine, tmp_path / "straight", prompts)
    path = tmp_path / "cut" / OWN_TEXT

    def stop(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speak_all(path, SETTINGS, prompts, partial(speaking, engine), stop)
    whole = path.read_bytes()
    assert whole.count(b"\n") == 1 + TOGETHER
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        with pytest.raises(TraceError, match="No space left"):
            spoken(engine, path.parent, prompts)
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"document": "cut')
    assert spoken(engine, path.parent, prompts) == expected
    assert path.read_bytes() == (tmp_path / "straight" / OWN_TEXT).read_bytes()
    assert [each.document for each in expected] == [document for document, _ in prompts]
    assert all(len(each.tokens) == 5 + NEW for each in expected)
    # A text depends on its document, not on what is beside it.
    alone = list(speaking(engine, [([prompts[3][1]], [int(prompts[3][0].digest[:8], 16)])]))
    assert alone == [[expected[3].new]]


def _full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_was_written_otherwise_is_refused(
    engine: AdaptiveEngine, prompts: Prompts, tmp_path: Path
) -> None:
    spoken(engine, tmp_path, prompts[:2])
    for others, settings, told in (
        (prompts[:2], {"temperature": 0.0}, "is text of .*0.7.*, not .*0.0"),
        (prompts[1:2], {}, "of other documents"),
    ):
        with pytest.raises(TraceError, match=told):
            spoken(engine, tmp_path, others, **settings)
    (tmp_path / OWN_TEXT).write_text(json.dumps(SETTINGS) + "\n3\n")
    with pytest.raises(TraceError, match="unreadable"):
        spoken(engine, tmp_path, prompts)
    (tmp_path / OWN_TEXT).write_text(json.dumps(SETTINGS))  # killed in its first line
    assert len(spoken(engine, tmp_path, prompts[:2])) == 2


def test_greedy_text_is_full_depths(engine: AdaptiveEngine, prompts: Prompts) -> None:
    texts = [prompt for _, prompt in prompts[:3]]
    done = engine.generate(texts, SamplingParams(max_tokens=NEW), NeverExit())
    assert go_on(engine, texts, NEW) == [each.token_ids for each in done]
    with pytest.raises(Exception, match="prompt"):
        go_on(engine, [texts[0], []], NEW)
    assert engine.load == (0, 0)


def test_a_conversation_begins_with_all_before_its_first_answer() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4."), ("user", "Sure?")]
    begun = beginning(tokenizer, Document.of_turns(turns, "a:1"), 4)
    assert tokenizer.decode(begun) == "<system>Be brief.<user>2 + 2?<assistant>"
    assert beginning(tokenizer, Document.of_turns(turns[2:], "a:2"), 4) == []
    assert tokenizer.decode(beginning(tokenizer, Document.of("a text", "b"), 4)) == "a te"


def test_what_is_asked_for_is_named() -> None:
    assert OwnText.asked_for(False, 0.0, 0.25) is None
    own = OwnText.asked_for(True, 0.7, 0.25)
    assert own is not None
    assert own.name == "the model's own, at temperature 0.7"
    assert own.lengths(257) == (64, 193)
    assert own.lengths(2) == (1, 2)
    for wanted, temperature, share, field in (
        (True, -1.0, 0.25, "temperature"),
        (True, float("nan"), 0.25, "temperature"),
        (True, 0.0, 1.0, "prompt_share"),
        (False, 0.7, 0.25, "temperature"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}: "):
            OwnText.asked_for(wanted, temperature, share)
