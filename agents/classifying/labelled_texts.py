"""Texts with labels: read from a file, split so that every class is learned from."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError, RequestError, TraceError
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.engine.encoding import require_unicode

TEXT = "text"
"""Name of the field that holds the text, unless another is asked for."""


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """Texts and the class of each.

    Attributes:
        texts: What is classified.
        labels: Name of each text's class.
        lines: Line of each in its file; none of texts that come from no file.
        path: The file.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    lines: tuple[int, ...] = ()
    path: str = ""

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
        texts, labels, lines = (
            tuple(each[p] for p in found) if each else ()
            for each in (self.texts, self.labels, self.lines)
        )
        return LabelledTexts(texts, labels, lines, self.path)

    def at(self, place: int) -> str:
        """Where a text comes from, in words."""
        return f"line {self.lines[place]} of {self.path}" if self.lines else f"text {place}"

    def indices(self, classes: Sequence[str], field: str = "data") -> IndexArray:
        """Index of each text's class among those that were learned.

        Raises:
            TraceError: a label is not among them; the message says where it is.
        """
        index = {name: place for place, name in enumerate(classes)}
        if unseen := [place for place, name in enumerate(self.labels) if name not in index]:
            others = f" ({len(unseen)} such texts)" if unseen[1:] else ""
            raise TraceError(
                field,
                f"{self.at(unseen[0])} has the label {self.labels[unseen[0]]!r}, of which no text "
                f"was learned from{others}",
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


def read_labelled(path: str | Path, text: str = TEXT, label: str = "") -> LabelledTexts:
    """Read a file of texts with labels.

    Args:
        path: A ``.csv`` file with a line of names first, or a ``.jsonl`` file of objects.
        text: Name of the field that holds the text.
        label: Name of the field that holds the label; "" is the only other one.

    Raises:
        TraceError: field ``data``; the file cannot be read, lacks a field, or holds an empty text
            or one class only. The message names the line.
    """
    path = Path(path)
    if text == label:
        raise TraceError("label_field", f"{label!r} is the text's field", "Name another")
    texts, labels, lines = [], [], []
    for line, record in _records(path):
        name = label or _only_other(path, line, record, text)
        for field in (text, name):
            _require_value(path, line, record, field)
        if not str(record[text]).strip():
            raise _unusable(path, line, "holds an empty text", "Leave it out")
        if not str(record[name]).strip():
            raise _unusable(path, line, "holds an empty label", "Leave it out")
        texts.append(str(record[text]))
        labels.append(str(record[name]).strip())
        lines.append(line)
    found = LabelledTexts(tuple(texts), tuple(labels), tuple(lines), str(path))
    if len(found.classes) < 2:
        said = f"holds one class only ({found.classes[0]!r})" if texts else "holds no text"
        raise TraceError("data", f"{path} {said}", "Give texts of two classes or more")
    return found


def encoded(model: SequenceModel, texts: LabelledTexts) -> list[list[int]]:
    """Token ids of the texts of a file.

    Raises:
        TraceError: field ``data``; a text is empty or over the model's context. The message says
            where it is.
    """
    try:
        return model.encode(texts.texts, texts.at)
    except RequestError as error:
        problem = f"{error.field} {error.problem}"
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
                yield from _rows(path, csv.DictReader(file))
                return
            for line, content in enumerate(file, 1):
                if content.strip():
                    yield line, _object_in(path, line, content)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError("data", f"{path} cannot be read ({error})", "Check the file") from error


def _rows(path: Path, reader: csv.DictReader[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table, each with the number of the line that it ends on."""
    try:
        for record in reader:
            if None in record:
                problem = "holds more columns than the first line names"
                raise _unusable(path, reader.line_num, problem, "Quote texts with commas")
            yield reader.line_num, dict(record)
    except csv.Error as error:
        problem = f"cannot be read ({error})"
        raise _unusable(path, reader.line_num + 1, problem, "Check the file") from error


def _object_in(path: Path, line: int, content: str) -> dict[str, Any]:
    """The object that a line of JSON is."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, JSONDecodeError) else error
        raise _unusable(path, line, f"is no JSON ({why})", 'Write {"text": …}') from error
    if not isinstance(found, dict):
        raise _unusable(path, line, "holds no object", 'Write {"text": …}')
    return found


def _require_value(path: Path, line: int, record: dict[str, Any], field: str) -> None:
    """Refuse a line without a text, or a label, of a kind that can be one."""
    if field not in record:
        raise _unusable(path, line, f"has no field {field!r}", _fields(record))
    value = record[field]
    if value is None:
        raise _unusable(path, line, f"says nothing as {field!r}", "Fill it in, or leave it out")
    if not isinstance(value, str | int):
        raise _unusable(path, line, f"has {value!r:.40} as {field!r}", "Write it as a string")
    try:
        require_unicode(field, str(value))
    except RequestError as error:
        raise _unusable(path, line, f"{error.problem} of {field!r}", error.remedy) from error


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
