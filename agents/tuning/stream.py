"""Training windows, streamed: documents are tokenized when their turn comes, then forgotten.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.agents.recording.documents import Document
from offramp.controller.errors import ConfigError, TraceError

Encode = Callable[[Document], list[int]]
"""Token ids of a text."""


def data_digest(train: Sequence[Document], held_out: Sequence[Document]) -> str:
    """SHA-256 over which documents are trained on and which are held out."""
    digest = hashlib.sha256()
    for name, documents in (("train", train), ("held out", held_out)):
        listed = ",".join(sorted(document.digest for document in documents))
        digest.update(f"{name}:{listed};".encode())
    return digest.hexdigest()


class WindowStream:
    """Endless batches of windows; each row of a batch reads documents of its own.

    Rows take whole documents in turn from one shuffled order, so a batch mixes as many documents
    as it has rows. Each pass over the documents is shuffled anew, by seed and number of the pass:
    the position below is all there is to the stream's randomness.

    Args:
        documents: Documents to read, at least one.
        encode: Gives the token ids of a document.
        separator: Token between documents; None for none.
        rows: Rows B of a batch.
        length: Tokens T of a row.
        seed: Seeds the order of the documents.

    Raises:
        TraceError: no documents; ``next`` raises it if all together do not fill a window.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        encode: Encode,
        separator: int | None,
        *,
        rows: int,
        length: int,
        seed: int,
    ) -> None:
        if not documents:
            raise TraceError("corpus", "has no training document", "Use more documents")
        self._documents = documents
        self._encode = encode
        self._end = [] if separator is None else [separator]
        self._length = length
        self._seed = seed
        self._pass = 0
        self._taken = 0
        self._pending: list[list[int]] = [[] for _ in range(rows)]

    @property
    def position(self) -> dict[str, Any]:
        """Where the stream is: the pass, documents taken of it, and each row's unread tokens."""
        pending = [list(tokens) for tokens in self._pending]
        return {"pass": self._pass, "taken": self._taken, "pending": pending}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on where another stream of the same arguments was.

        Raises:
            ConfigError: it had another number of rows.
        """
        if len(position["pending"]) != len(self._pending):
            raise ConfigError("batch_tokens", "is not that of the checkpoint", "Give the old one")
        self._pass, self._taken = int(position["pass"]), int(position["taken"])
        self._pending = [list(tokens) for tokens in position["pending"]]

    def next(self) -> Tensor:
        """The next batch, [B, T] int64."""
        return torch.tensor([self._window(row) for row in range(len(self._pending))])

    def _window(self, row: int) -> list[int]:
        pending = self._pending[row]
        read = 0
        while len(pending) < self._length:
            pending += [*self._encode(self._take()), *self._end]
            read += 1
            if read > 2 * len(self._documents):  # a whole pass among them
                raise TraceError(
                    "corpus",
                    f"has fewer tokens to train on than one window of {self._length}",
                    "Add text, or lower --length",
                )
        window, self._pending[row] = pending[: self._length], pending[self._length :]
        return window

    def _take(self) -> Document:
        if self._taken == len(self._documents):
            self._pass, self._taken = self._pass + 1, 0
        order = np.random.default_rng([self._seed, self._pass]).permutation(len(self._documents))
        document = self._documents[int(order[self._taken])]
        self._taken += 1
        return document
