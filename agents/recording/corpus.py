"""Documents for traces: which texts there are, and the split that each belongs to.

The split is read off a document's own content, so adding, renaming or removing files never
moves another document from one split to the next.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offramp.controller.errors import ConfigError, TraceError
from offramp.envs.traces.store import write_traces
from offramp.worker.model.loading import load_tokenizer

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

TRAIN_SHARE = 0.70
"""Share of all documents that policies are trained on."""
VALIDATION_SHARE = 0.15
"""Share that choices are made on; what is left is the test split."""

FOLDER_SUFFIXES = frozenset({".py", ".txt"})
NOT_STANDARD_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

SPLIT = "split.json"
"""Which document of the corpus is in which split, by digest."""

BATCH = 64
"""Documents tokenised at a time: those beyond the last one needed stay unread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, named by its content.

    Attributes:
        text: The whole text, line ends as `\\n`.
        digest: SHA-256 of the UTF-8 text, hexadecimal.
        path: Where it was found, relative to the corpus root, with `/`.
        split: The split it belongs to, a function of `digest` alone.
    """

    text: str
    digest: str
    path: str
    split: Split

    @classmethod
    def of(cls, text: str, path: str) -> Document:
        """Name a text by its content and let the content choose the split."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(text=text, digest=digest, path=path, split=split_of(digest))


def split_of(digest: str) -> Split:
    """The split of the document with this hexadecimal SHA-256."""
    # The last digits: documents are ordered by the first, and a limit cuts that order.
    draw = int(digest[-8:], 16) / 16**8
    if draw < TRAIN_SHARE:
        return "train"
    return "validation" if draw < TRAIN_SHARE + VALIDATION_SHARE else "test"


def load_corpus(
    folder: Path | None, limit: int | None = None, min_chars: int = 2000, max_line: int = 400
) -> list[Document]:
    """Read the documents under a folder, each content once, in order of digest.

    Args:
        folder: Its `*.py` and `*.txt` files are read, recursively. None: the Python files of
            this interpreter's standard library, without its tests.
        limit: Documents to keep, a random but stable sample. None: all.
        min_chars: Shorter documents are left out, characters.
        max_line: Documents with a longer line (generated tables) are left out, characters.

    Files that cannot be read, or are not UTF-8, are left out.

    Raises:
        TraceError: the folder is missing, no document is left, a split has none of those
            left, or the limit has no room for one document per split.
    """
    if limit is not None and limit < len(SPLITS):
        raise TraceError("limit", f"{limit} leaves a split empty", "Use 3 or more")
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = _library_files(root) if folder is None else _folder_files(root)
    texts = (item for item in _read(root, paths) if _is_usable(item[1], min_chars, max_line))
    unique: dict[str, Document] = {}
    for path, text in texts:
        document = Document.of(text, path)
        unique.setdefault(document.digest, document)
    documents = [unique[digest] for digest in sorted(unique)][:limit]
    _check_splits(documents, root)
    return documents


def tokenize(model: str, documents: Sequence[Document]) -> list[tuple[Document, list[int]]]:
    """Token ids of each document.

    Raises:
        ModelError: the model has no tokenizer.
    """
    tokenizer = load_tokenizer(model)
    encoded = tokenizer([doc.text for doc in documents], verbose=False)["input_ids"]
    return list(zip(documents, encoded, strict=True))


def long_documents(
    model: str, documents: Sequence[Document], length: int, count: int
) -> list[tuple[Document, list[int]]]:
    """The first documents of at least ``length`` tokens, with their tokens.

    Raises:
        ModelError: the model has no tokenizer.
    """
    found: list[tuple[Document, list[int]]] = []
    for start in range(0, len(documents), BATCH):
        batch = tokenize(model, documents[start : start + BATCH])
        found += [(document, tokens) for document, tokens in batch if len(tokens) >= length]
        if len(found) >= count:
            break
    return found[:count]


def recorded_digests(traces: Path) -> set[str]:
    """Digests of all documents, of every split, that a recording took from its corpus.

    Raises:
        ConfigError: the recording does not say which.
    """
    try:
        table = json.loads((traces / SPLIT).read_text(encoding="utf-8"))
        return {digest for digest in table if bytes.fromhex(digest)}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError("traces", f"{traces / SPLIT} is unreadable", "Record again") from error


def window(document: Document, tokens: list[int], length: int) -> list[int]:
    """At most ``length`` tokens, from a place that the document's digest picks."""
    room = max(0, len(tokens) - length)
    start = int(document.digest[:8], 16) % (room + 1)
    return tokens[start : start + length]


def write_split(documents: Iterable[Document], path: Path) -> None:
    """Record which document is in which split, durably, as JSON by digest.

    Raises:
        TraceError: the file cannot be written; an older one is untouched.
    """
    table = {each.digest: {"path": each.path, "split": each.split} for each in documents}
    content = json.dumps(table, indent=1, sort_keys=True) + "\n"
    write_traces(path, content.encode())


def _library_files(root: Path) -> list[Path]:
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(path for path in files if NOT_STANDARD_LIBRARY.isdisjoint(path.parts))


def _folder_files(root: Path) -> list[Path]:
    if not root.is_dir():
        remedy = "Give a folder of .py or .txt files, or none for Python's standard library"
        raise TraceError("corpus", f"{root} is no folder", remedy)
    files = (path for path in root.rglob("*") if path.suffix in FOLDER_SUFFIXES)
    return sorted(path.relative_to(root) for path in files)


def _read(root: Path, paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield path.as_posix(), text


def _is_usable(text: str, min_chars: int, max_line: int) -> bool:
    if len(text) < min_chars:
        return False
    return all(len(line) <= max_line for line in text.splitlines())


def _check_splits(documents: list[Document], root: Path) -> None:
    if not documents:
        problem = f"{root} holds no usable document"
        raise TraceError("corpus", problem, "Add .py or .txt files, or lower min_chars")
    found = {document.split for document in documents}
    empty = [split for split in SPLITS if split not in found]
    if empty:
        problem = f"the {len(documents)} documents leave {' and '.join(empty)} empty"
        raise TraceError("corpus", problem, "Add documents, raise limit or lower min_chars")
