"""The documents that a calibration may use: nothing was trained, chosen or reported on them.

``offramp record`` writes down which documents it took, of every split (``split.json``): training,
validation, where hyper-parameters and operating points are chosen, and test. The corpus goes on
beyond them, in the order of a hash, so the rest are draws from the same corpus that nobody has
looked at. Calibration takes those, leaving out the ones that a larger recording would put into its
test split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.agents.evaluation.lines import Line, cut_lines
from offramp.agents.recording.corpus import load_corpus, long_documents, recorded_digests, window
from offramp.agents.recording.documents import Document
from offramp.controller.errors import TraceError

LINES = 4
"""Lines completed in each document at most."""

LONGEST = 24
"""Tokens of a completion at most."""


@dataclass(frozen=True, slots=True)
class CalibrationDocument:
    """A window of a document that nothing was trained, chosen or reported on.

    Attributes:
        digest: SHA-256 of the document's text, hex.
        tokens: Token ids of the window.
    """

    digest: str
    tokens: tuple[int, ...]


def data_digest(documents: Sequence[CalibrationDocument]) -> str:
    """SHA-256 over digests and tokens, in order, hex."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(f"{document.digest}:{','.join(map(str, document.tokens))}\n".encode())
    return whole.hexdigest()


def unseen_documents(corpus: Path | None, traces: Path) -> list[Document]:
    """The documents of a corpus that a recording did not take, test documents left out.

    Args:
        corpus: Folder of documents; None: the standard library.
        traces: Folder that ``offramp record`` wrote.

    Raises:
        ConfigError: the recording does not say which documents it took.
        TraceError: the corpus cannot be read.
    """
    recorded = recorded_digests(traces)
    everything = load_corpus(corpus)
    return [each for each in everything if each.digest not in recorded and each.split != "test"]


def calibration_windows(
    model: str, documents: Sequence[Document], length: int, count: int
) -> list[CalibrationDocument]:
    """A window of each document that is long enough, in the order of their digests.

    Args:
        model: Folder of the model whose tokenizer reads them.
        documents: Documents that may be used.
        length: Tokens of each window.
        count: Documents to take at most.

    Raises:
        TraceError: no document is left that is long enough.
    """
    found = long_documents(model, documents, length, count)
    if not found:
        raise TraceError(
            "calibration documents",
            f"none of {len(documents)} unseen documents has {length} tokens",
            "Give a larger --corpus, or record fewer of its --documents",
        )
    return [
        CalibrationDocument(document.digest, tuple(window(document, tokens, length)))
        for document, tokens in found
    ]


def with_lines(
    documents: Sequence[CalibrationDocument], tokenizer: object, prompt_tokens: int
) -> list[tuple[CalibrationDocument, list[Line]]]:
    """The documents whose window holds a line to complete, with up to ``LINES`` of them.

    Args:
        documents: Windows of documents.
        tokenizer: The tokenizer that made their tokens.
        prompt_tokens: Tokens before a cut at most.

    Raises:
        TraceError: no window holds one.
    """
    cut = [
        cut_lines(
            each.tokens,
            tokenizer,
            count=LINES,
            context=prompt_tokens,
            longest=LONGEST,
            digest=each.digest,
        )
        for each in documents
    ]
    found = [(each, lines) for each, lines in zip(documents, cut, strict=True) if lines]
    if not found:
        raise TraceError(
            "calibration documents",
            f"none of {len(documents)} windows holds a line of at most {LONGEST} tokens",
            "Raise --new-tokens, or give a larger --corpus",
        )
    return found
