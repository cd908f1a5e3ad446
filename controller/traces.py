"""What a worker records and an environment replays: one row per token, columns by exit.

Shape suffixes: T tokens, E exits, F feature columns, S = 3 softmax columns, D model width,
C = 2 + E tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import TraceError
from offramp.controller.features import FloatArray, IntArray

HalfArray = NDArray[np.float16]

TRACE_VERSION = 2
"""Raised whenever a column is added, removed or changes its meaning."""

PER_TOKEN = (
    "position_T", "features_TEF", "softmax_TES", "exit_token_TE", "full_token_T", "next_token_T",
    "gap_TE", "state_TED",
)  # fmt: skip
"""Columns of a chunk that have a row per token."""

SOFTMAX_COLUMNS = ("top1", "margin", "entropy")
"""The columns S of ``softmax_TES``: the first three of SOFTMAX_V2, with its meanings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What must be equal for chunks to be read together.

    Attributes:
        model: Fingerprint of the model decoded.
        schema: Digest of the candidate feature schema.
        exits: Layers probed, ascending.
        layers: Number of layers L.
        translators: Digest of the translators that exits were read through; "" for none.
        adapters: Exits among them behind which an adapter layer runs, at the price of a layer.
        width: Columns D of the hidden states recorded; 0 if none are.
        text: Says whose text was decoded, such as "the model's own, greedy"; "" if it is that of
            documents as they are.
    """

    model: str
    schema: str
    exits: tuple[int, ...]
    layers: int
    translators: str = ""
    adapters: tuple[int, ...] = ()
    width: int = 0
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceChunk:
    """Tokens of one document, decoded at full depth.

    Attributes:
        document: SHA-256 of the document's text.
        position_T: Position of each token in the document, int32.
        features_TEF: Candidate features at each exit, float32.
        softmax_TES: Full-vocabulary top1, top1 − top2 and entropy / ln V at each exit, float32.
        exit_token_TE: Token the model would emit at each exit, int32.
        full_token_T: Token emitted at full depth, int32.
        next_token_T: Token that really follows in the document, int32.
        gap_TE: Full-depth log-probability of the exit's token minus that of the full-depth
            token, nats ≤ 0, float32.
        state_TED: What norm and head read at each exit, float16; None unless asked for.
    """

    document: str
    position_T: IntArray
    features_TEF: FloatArray
    softmax_TES: FloatArray
    exit_token_TE: IntArray
    full_token_T: IntArray
    next_token_T: IntArray
    gap_TE: FloatArray
    state_TED: HalfArray | None = None

    def __post_init__(self) -> None:
        tokens, exits = self.gap_TE.shape
        expected: dict[str, tuple[int, ...]] = {
            "position_T": (tokens,),
            "exit_token_TE": (tokens, exits),
            "full_token_T": (tokens,),
            "next_token_T": (tokens,),
            "softmax_TES": (tokens, exits, len(SOFTMAX_COLUMNS)),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise TraceError(name, f"has shape {found}, not {shape}")
        _check_wide("features_TEF", self.features_TEF, tokens, exits)
        for name in ("features_TEF", "softmax_TES", "gap_TE"):
            _check_finite(name, getattr(self, name))
        if self.state_TED is not None:
            _check_wide("state_TED", self.state_TED, tokens, exits)
            _check_finite("state_TED", self.state_TED)

    def __len__(self) -> int:
        return len(self.position_T)

    def after(self, first: int) -> TraceChunk:
        """The tokens from position ``first`` on."""
        kept = {n: getattr(self, n) for n in PER_TOKEN if getattr(self, n) is not None}
        return replace(self, **{name: values[first:] for name, values in kept.items()})

    def without_text(self) -> TraceChunk:
        """The same, with each row's tokens numbered anew, the full-depth one as 0.

        Which of them are equal is all that training asks, and stays; which they are is gone, and
        with it the text.
        """
        columns = (self.full_token_T[:, None], self.next_token_T[:, None], self.exit_token_TE)
        token_TC = np.concatenate(columns, axis=1)
        first_TC = (token_TC[:, :, None] == token_TC[:, None, :]).argmax(axis=2).astype(np.int32)
        return replace(
            self,
            full_token_T=first_TC[:, 0],
            next_token_T=first_TC[:, 1],
            exit_token_TE=first_TC[:, 2:],
        )


def _check_wide(name: str, values: NDArray[Any], tokens: int, exits: int) -> None:
    if values.ndim != 3 or values.shape[:2] != (tokens, exits):
        raise TraceError(name, f"has shape {values.shape}, not ({tokens}, {exits}, columns)")


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise TraceError(name, "holds NaN or infinite values", "Record the document again")
