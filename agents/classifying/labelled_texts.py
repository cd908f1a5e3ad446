"""Texts with labels: read from a file, split so that every class is learned from."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError, RequestError, TraceError
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.sequence_model import SequenceModel

TEXT = "text"
"""Name of the field that holds the text, unless another is asked for."""


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts and the class of each.

    Attributes:
        texts: What is classified.
        labels: Name of each text's class.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def digest(self) -> str:
        """SHA-256 over all texts and labels, in order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

    def of(self, places: IndexArray) -> LabelledTexts:
        """Some of them, in the order given."""
        found = places.tolist()
        return LabelledTexts(
            tuple(self.texts[p] for p in found), tuple(self.labels[p] for p in found)
        )

    def indices(self, classes: Sequence[str], field: str = "data") -> IndexArray:
        """Index of each text's class among those that were learned.

        Raises:
            TraceError: a label is not among them.
        """
        index = {name: place for place, name in enumerate(classes)}
        if unseen := sorted(set(self.labels) - set(classes)):
            raise TraceError(
                field,
                f"holds the label {unseen[0]!r}, of which no text was learned from "
                f"({len(unseen)} such)",
                "Add texts of it to the training file, or leave it out",
            )
        return np.array([index[name] for name in self.labels], np.int64)


TEXTS = "texts.txt"
"""File, beside heads or policies, of the SHA-256 of every text of their data, one a line."""


def text_digest(text: str) -> str:
    """SHA-256 of a text, hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def save_texts(folder: Path, texts: LabelledTexts) -> None:
    """Note beside what is fitted which texts it may know."""
    lines = "".join(f"{text_digest(each)}\n" for each in texts.texts)
    write_durably(folder / TEXTS, lines.encode())


def known_texts(folder: Path) -> set[str]:
    """Digests of the texts that were noted; none where nothing was."""
    path = folder / TEXTS
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def unknown_among(texts: LabelledTexts, known: Container[str]) -> IndexArray:
    """Places of the texts that are not among those with these digests."""
    return np.array(
        [place for place, text in enumerate(texts.texts) if text_digest(text) not in known],
        np.int64,
    )


def read_labelled(path: Path, text: str = TEXT, label: str = "") -> LabelledTexts:
    """Read a file of texts with labels.

    Args:
        path: A ``.csv`` file with a line of names first, or a ``.jsonl`` file of objects.
        text: Name of the field that holds the text.
        label: Name of the field that holds the label; "" is the only other one.

    Raises:
        TraceError: field ``data``; the file cannot be read, lacks a field, or holds an empty text
            or one class only. The message names the line.
    """
    texts, labels = [], []
    for line, record in _records(path):
        name = label or _only_other(path, line, record, text)
        for field in (text, name):
            if not isinstance(record.get(field), str | int | bool):
                raise _unusable(path, line, f"has no field {field!r}", _fields(record))
        if not str(record[text]).strip():
            raise _unusable(path, line, "holds an empty text", "Leave it out")
        if not str(record[name]).strip():
            raise _unusable(path, line, "holds an empty label", "Leave it out")
        texts.append(str(record[text]))
        labels.append(str(record[name]))
    found = LabelledTexts(tuple(texts), tuple(labels))
    if len(found.classes) < 2:
        said = f"holds one class only ({found.classes[0]!r})" if texts else "holds no text"
        raise TraceError("data", f"{path} {said}", "Give texts of two classes or more")
    return found


def encoded(model: SequenceModel, texts: LabelledTexts, data: Path) -> list[list[int]]:
    """Token ids of the texts of a file.

    Raises:
        TraceError: field ``data``; a text is empty or over the model's context.
    """
    try:
        return model.encode(texts.texts)
    except RequestError as error:
        problem = f"{error.field.replace('input', 'text')} of {data} {error.problem}"
        raise TraceError("data", problem, "Shorten it, or leave it out") from error


def split_by_class(labels: Sequence[str], share: float, seed: int) -> tuple[IndexArray, IndexArray]:
    """Places to learn from and places held out, the same share of every class.

    A class of few texts is learned from first: of a single text, nothing is held out.
    """
    rng = np.random.default_rng(seed)
    by_class: dict[str, list[int]] = {}
    for place, name in enumerate(labels):
        by_class.setdefault(name, []).append(place)
    nobody = np.empty(0, np.int64)  # of no texts at all, nothing is either
    learned, held = [nobody], [nobody]
    for name in sorted(by_class):
        places = rng.permutation(by_class[name])
        count = int(len(places) * share)
        held.append(places[:count])
        learned.append(places[count:])
    return np.sort(np.concatenate(learned)), np.sort(np.concatenate(held))


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of each line and what it holds."""
    if path.suffix not in (".csv", ".jsonl"):
        raise TraceError("data", f"{path} is neither .csv nor .jsonl", "Convert it to one of them")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for record in reader:
                    yield reader.line_num, {str(name): each for name, each in record.items()}
                return
            for line, content in enumerate(file, 1):
                if content.strip():
                    found = json.loads(content)
                    if not isinstance(found, dict):
                        raise _unusable(path, line, "holds no object", 'Write {"text": …}')
                    yield line, found
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        raise TraceError("data", f"{path} cannot be read ({error})", "Check the file") from error


def _only_other(path: Path, line: int, record: dict[str, Any], text: str) -> str:
    others = [name for name in record if name != text]
    if len(others) != 1:
        problem = "does not have one field beside the text's that could be the label"
        raise _unusable(path, line, problem, f"{_fields(record)}; name it with --label-field")
    return others[0]


def _fields(record: dict[str, Any]) -> str:
    return f"It has {', '.join(map(str, record)) or 'none'}"


def _unusable(path: Path, line: int, problem: str, remedy: str) -> TraceError:
    return TraceError("data", f"line {line} of {path} {problem}", remedy)


def require_share(name: str, share: float) -> None:
    """Refuse a share that leaves nothing on one side.

    Raises:
        ConfigError: it is not within (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(name, f"{share} is not within (0, 1)", "Try 0.2")
