"""Documents for traces: which texts there are, and the split that each belongs to.

The split is read off a document's own content, so adding, renaming or removing files never
moves another document from one split to the next.
"""

from __future__ import annotations

import json
import logging
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from offramp.agents.recording.documents import SPLITS, Document, encode, read_line
from offramp.controller.errors import ConfigError, TraceError
from offramp.envs.traces.store import write_traces
from offramp.worker.model.loading import load_tokenizer

SUFFIXES = frozenset({".py", ".txt", ".jsonl"})
LIBRARY_CHARS = 2000
"""Least length of a file of the standard library."""
FOLDER_CHARS = 200
"""Least length of a file of a user's own."""
LONGEST_LINE = 400
"""Longest line of a Python file that was written by people."""

LOG = logging.getLogger(__name__)
NOT_STANDARD_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

SPLIT = "split.json"
"""Which document of the corpus is in which split, by digest."""

BATCH = 64
"""Documents tokenised at a time: those beyond the last one needed stay unread."""


def load_corpus(
    corpus: Path | None, limit: int | None = None, min_chars: int | None = None
) -> list[Document]:
    """Read the documents of a corpus, each content once, in order of digest.

    What is left out is counted and logged, once a process, with the reason: files that cannot be
    read or are not UTF-8, texts below ``min_chars``, `.py` files with a line of more than
    ``LONGEST_LINE`` characters (generated tables), and contents that came before.

    Args:
        corpus: A folder whose `*.py`, `*.txt` and `*.jsonl` files are read, recursively, or one
            such file. Each line of a `.jsonl` file is a document (``read_line``). None: the
            Python files of this interpreter's standard library, without its tests.
        limit: Documents to keep, a random but stable sample. None: all.
        min_chars: Shorter texts are left out, characters. None: ``LIBRARY_CHARS`` for the
            standard library, else ``FOLDER_CHARS``.

    Raises:
        TraceError: the corpus is missing, a line of a `.jsonl` file is no document, no document is
            left, a split has none of those left, or the limit has no room for one document per
            split.
    """
    if limit is not None and limit < len(SPLITS):
        raise TraceError("limit", f"{limit} leaves a split empty", "Use 3 or more")
    if corpus is None:
        root = Path(sysconfig.get_path("stdlib"))
        paths, fewest = _library_files(root), LIBRARY_CHARS
    else:
        root, paths = _folder_files(corpus)
        fewest = FOLDER_CHARS
    left_out: Counter[str] = Counter()
    unique: dict[str, Document] = {}
    for document in _read(root, paths, fewest if min_chars is None else min_chars, left_out):
        if document.digest in unique:
            left_out["repeated"] += 1
        unique.setdefault(document.digest, document)
    _say_what_is_left_out(corpus, len(unique), tuple(left_out.items()))
    documents = [unique[digest] for digest in sorted(unique)][:limit]
    _check_splits(documents, corpus or root, left_out)
    return documents


def tokenize(model: str, documents: Sequence[Document]) -> list[tuple[Document, list[int]]]:
    """Token ids of each document.

    Raises:
        ModelError: the model has no tokenizer.
        TraceError: a conversation, and the model has no chat template for it.
    """
    tokenizer = load_tokenizer(model)
    return [(document, encode(tokenizer, document)) for document in documents]


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


def _folder_files(corpus: Path) -> tuple[Path, list[Path]]:
    if corpus.is_file():
        return corpus.parent, [Path(corpus.name)]
    if not corpus.is_dir():
        remedy = (
            "Give a folder of .py, .txt or .jsonl files, one such file, or none for Python's "
            "standard library"
        )
        raise TraceError("corpus", f"{corpus} is no folder", remedy)
    files = (path for path in corpus.rglob("*") if path.suffix in SUFFIXES)
    return corpus, sorted(path.relative_to(corpus) for path in files)


def _read(
    root: Path, paths: Iterable[Path], min_chars: int, left_out: Counter[str]
) -> Iterator[Document]:
    for path in paths:
        try:
            text = (root / path).read_text(encoding="utf-8")
        except OSError:
            left_out["unreadable"] += 1
            continue
        except UnicodeDecodeError:
            left_out["not UTF-8"] += 1
            continue
        if path.suffix == ".jsonl":
            # Not splitlines: JSON's texts may hold what else Unicode takes for an end of line.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield read_line(line, f"{path.as_posix()}:{number}")
        elif len(text) < min_chars:
            left_out[f"shorter than {min_chars} characters"] += 1
        elif path.suffix == ".py" and any(len(line) > LONGEST_LINE for line in text.splitlines()):
            left_out[f"with a line over {LONGEST_LINE} characters"] += 1
        else:
            yield Document.of(text, path.as_posix())


@cache
def _say_what_is_left_out(
    corpus: Path | None, kept: int, left_out: tuple[tuple[str, int], ...]
) -> None:
    if left_out:
        # Whoever did not choose the library's files need not hear of them.
        level = logging.INFO if corpus is None else logging.WARNING
        LOG.log(level, "%s: %d documents; left out: %s", corpus, kept, _listed(dict(left_out)))


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _check_splits(documents: list[Document], root: Path, left_out: Mapping[str, int]) -> None:
    why = f"; left out: {_listed(left_out)}" if left_out else ""
    if not documents:
        problem = f"{root} holds no usable document{why}"
        raise TraceError("corpus", problem, "Add longer .py or .txt files, or .jsonl documents")
    found = {document.split for document in documents}
    empty = [split for split in SPLITS if split not in found]
    if empty:
        problem = f"the {len(documents)} documents leave {' and '.join(empty)} empty{why}"
        raise TraceError("corpus", problem, "Add documents, or raise their limit (--documents)")
