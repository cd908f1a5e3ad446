"""Files of labelled texts: what is read, and what is refused by line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from offramp.agents.classifying.labelled_texts import LabelledTexts, read_labelled, split_by_class
from offramp.controller.errors import TraceError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,category\n"one, two",x\nthree,y\n'),
        ("a.csv", 'text,category\n"one, two",x \nthree, y\n'),
        ("a.csv", '\ufefftext,category\n"one, two",x\nthree,y\n'),  # as spreadsheets save it
        ("a.jsonl", '{"text": "one, two", "label": "x"}\n\n{"text": "three", "label": "y"}\n'),
    ],
)
def test_both_kinds_of_file_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_labelled(tmp_path / name)
    assert (found.texts, found.labels) == (("one, two", "three"), ("x", "y"))
    assert found.classes == ("x", "y")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\none,x\n ,y\n", "line 3 .* empty text"),
        ("a.csv", "text,label\none,x\ntwo,\n", "line 3 .* empty label"),
        ("a.csv", "text,label\none,x\ntwo,x\n", "one class only"),
        ("a.csv", "text,label\n", "no text"),
        ("a.csv", "sentence,label\none,x\n", "does not have one field beside"),
        ("a.csv", "text,label,source\none,x,s\n", "name it with --label-field"),
        ("a.csv", "text,label\none,x\ntwo\n", "line 3 .* says nothing as 'label'"),
        ("a.csv", "text,label\none, two,x\n", "line 2 .* more columns"),
        ("a.jsonl", '{"text": 1.5, "label": "x"}\n', "line 1 .* has 1.5 as 'text'"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1 .* says nothing as 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1.0}\n', "has 1.0 as 'label'. Write it as a string"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', r"has \[1\] as 'label'"),
        ("a.jsonl", '{"text": "\\ud800", "label": "x"}\n', "line 1 .* half of a surrogate"),
        ("a.csv", "text,label\none,x\n" + "w" * 140_000 + ",y\n", "line 3 .*field larger"),
        ("a.jsonl", "[1]\n", "line 1 .* no object"),
        (
            "a.jsonl",
            '{"text": "a", "label": "x"}\n\n{"te\n',
            r"line 3 .* is no JSON \(.*, column 5\)",
        ),
        ("a.txt", "", "neither .csv nor .jsonl"),
    ],
)
def test_an_unusable_file_is_refused_by_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TraceError, match=said) as raised:
        read_labelled(tmp_path / name)
    assert raised.value.field == "data"


def test_a_label_that_was_not_learned_is_named_with_its_line(tmp_path: Path) -> None:
    texts = LabelledTexts(("a", "b"), ("x", "new"))
    with pytest.raises(TraceError, match="text 1 has the label 'new', of which no text was"):
        texts.indices(("x", "y"))
    file = tmp_path / "a.jsonl"
    labels = ("x", "new", "y", "newer")
    file.write_text("".join(f'\n{{"text": "a", "label": "{each}"}}\n' for each in labels))
    read = read_labelled(str(file))
    said = r"line 4 of .*a\.jsonl has the label 'new', .* \(2 such texts\)"
    with pytest.raises(TraceError, match=said):
        read.indices(("x", "y"))
    assert read.of(np.array([2, 1])).at(1) == f"line 4 of {file}"


def test_every_class_is_learned_from_and_none_is_on_both_sides() -> None:
    labels = ["x"] * 10 + ["y"] * 5 + ["rare"]
    learned, held = split_by_class(labels, 0.4, seed=3)
    assert sorted([*learned, *held]) == list(range(16))
    assert {labels[place] for place in learned} == {"x", "y", "rare"}
    assert [labels[place] for place in held].count("x") == 4
    assert [labels[place] for place in held].count("y") == 2
