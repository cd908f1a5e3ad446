"""What a worker records and an environment replays: one row per token, columns by exit.

Shape suffixes: T tokens, E exits, F feature columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import TraceError
from offramp.controller.features import FloatArray, IntArray

TRACE_VERSION = 1
"""Raised whenever a column is added, removed or changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """What must be equal for chunks to be read together.

    Attributes:
        model: Fingerprint of the model decoded.
        schema: Digest of the candidate feature schema.
        exits: Layers probed, ascending.
        layers: Number of layers L.
    """

    model: str
    schema: str
    exits: tuple[int, ...]
    layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceChunk:
    """Tokens of one document, decoded at full depth.

    Attributes:
        document: SHA-256 of the document's text.
        position_T: Position of each token in the document, int32.
        features_TEF: Candidate features at each exit, float32.
        margin_TE: Full-vocabulary top1 − top2 probability at each exit (for CALM), float32.
        exit_token_TE: Token the model would emit at each exit, int32.
        full_token_T: Token emitted at full depth, int32.
        next_token_T: Token that really follows in the document, int32.
        gap_TE: Full-depth log-probability of the exit's token minus that of the full-depth
            token, nats ≤ 0, float32.
    """

    document: str
    position_T: IntArray
    features_TEF: FloatArray
    margin_TE: FloatArray
    exit_token_TE: IntArray
    full_token_T: IntArray
    next_token_T: IntArray
    gap_TE: FloatArray

    def __post_init__(self) -> None:
        tokens, exits = self.margin_TE.shape
        expected: dict[str, tuple[int, ...]] = {
            "position_T": (tokens,),
            "exit_token_TE": (tokens, exits),
            "full_token_T": (tokens,),
            "next_token_T": (tokens,),
            "gap_TE": (tokens, exits),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise TraceError(name, f"has shape {found}, not {shape}")
        if self.features_TEF.shape[:2] != (tokens, exits):
            raise TraceError("features_TEF", f"has shape {self.features_TEF.shape}")
        for name in ("features_TEF", "margin_TE", "gap_TE"):
            _check_finite(name, getattr(self, name))

    def __len__(self) -> int:
        return len(self.position_T)


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise TraceError(name, "holds NaN or infinite values", "Record the document again")
