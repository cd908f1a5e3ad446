"""Tests whether the features that a policy reads are still distributed as when it was trained.

Each feature of each exit has a two-sample Kolmogorov-Smirnov distance; the largest of them is the
statistic. Its null distribution is that under exchange of whole documents, since tokens of one
document are not independent: a permutation test of the maximum, which holds the chance of any false
alarm over all features at once (Westfall and Young 1993, "Resampling-Based Multiple Testing").

Shape suffixes: D documents, C columns (exits × features), G steps of a grid, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import TraceError
from offramp.controller.features import SCHEMAS, FloatArray
from offramp.envs.traces.tokens import TokenTraces

PLACES = frozenset({"depth", "position"})
"""Columns that say where a token is, and nothing of what it is."""

GRID = 64
"""Steps at which distributions are compared: quantiles of both recordings together."""

PERMUTATIONS = 999
LEAST_DOCUMENTS = 5
"""Documents of each recording; fewer cannot be told from chance at 1 %."""

Counts = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What the test found.

    Attributes:
        p_value: Chance of a distance at least so large if nothing changed.
        distance: The largest Kolmogorov-Smirnov distance, in [0, 1].
        column: Exit and feature where it is.
        document_counts: Documents before and after.
    """

    p_value: float
    distance: float
    column: str
    document_counts: tuple[int, int]


def find_drift(
    before: TokenTraces, after: TokenTraces, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Drift:
    """Compare the features of two recordings.

    Args:
        before: What the policy was trained on.
        after: What there is now.
        permutations: Exchanges of documents; the least p-value is 1 / (1 + permutations).
        seed: Seeds the exchanges.

    Raises:
        TraceError: they differ in model, probe, exits or translators, so that their features mean
            something else, or hold too few documents.
    """
    _require_alike(before, after)
    names = _columns(before)
    first, second = len(before.documents), len(after.documents)
    counts_DCG = _counts(before, after)
    rng = np.random.default_rng(seed)
    is_after_PD = np.zeros((permutations + 1, first + second))
    is_after_PD[0, first:] = 1.0  # as it is; the others are exchanges
    for row in range(1, permutations + 1):
        is_after_PD[row, rng.permutation(first + second)[:second]] = 1.0
    distance_PC = _distances(counts_DCG, is_after_PD)
    largest_P = distance_PC.max(axis=1)
    return Drift(
        # 1e-9: equal distances that were added up in another order
        p_value=float((largest_P >= largest_P[0] - 1e-9).mean()),
        distance=float(largest_P[0]),
        column=names[int(distance_PC[0].argmax())],
        document_counts=(first, second),
    )


def _require_alike(before: TokenTraces, after: TokenTraces) -> None:
    for name in ("model", "schema", "exits", "translators"):
        old, new = (getattr(each.header, name) for each in (before, after))
        if old != new:
            problem = f"have {name} {new}, and those of before {old}"
            raise TraceError("traces", problem, "Record both alike")
    for each in (before, after):
        if len(each.documents) < LEAST_DOCUMENTS:
            problem = f"hold {len(each.documents)} documents"
            raise TraceError("traces", problem, f"Record {LEAST_DOCUMENTS} or more")


def _columns(traces: TokenTraces) -> list[str]:
    features = [each for each in _feature_names(traces) if each not in PLACES]
    return [f"exit {layer}: {feature}" for layer in traces.header.exits for feature in features]


def _feature_names(traces: TokenTraces) -> tuple[str, ...]:
    return SCHEMAS[traces.header.schema].columns


def _values(traces: TokenTraces) -> FloatArray:
    kept = [i for i, name in enumerate(_feature_names(traces)) if name not in PLACES]
    values_NEF = traces.features_NEF[:, :, kept]
    return values_NEF.reshape(len(traces), -1)


def _counts(before: TokenTraces, after: TokenTraces) -> Counts:
    """How many tokens of each document lie at or below each step of each column's grid."""
    values_NC = np.concatenate([_values(before), _values(after)])
    document_N = np.concatenate([before.document_N, after.document_N + len(before.documents)])
    documents = len(before.documents) + len(after.documents)
    counts_DCG = np.zeros((documents, values_NC.shape[1], GRID))
    quantiles = np.linspace(0, 1, GRID, endpoint=False)
    for column, value_N in enumerate(values_NC.T):
        grid_G = np.quantile(value_N, quantiles, method="lower")
        place_N = np.searchsorted(grid_G, value_N, side="left")  # the first step at or above it
        within_N = place_N < GRID
        np.add.at(counts_DCG[:, column], (document_N[within_N], place_N[within_N]), 1.0)
    counts_DCG.cumsum(axis=2, out=counts_DCG)
    sizes_D = np.bincount(document_N, minlength=documents)
    return counts_DCG / sizes_D[:, None, None]  # long documents count no more than short ones


def _distances(counts_DCG: Counts, is_after_PD: Counts) -> Counts:
    """Kolmogorov-Smirnov distances [P, C] of the documents marked from the others."""
    documents, columns, grid = counts_DCG.shape
    flat = counts_DCG.reshape(documents, -1)
    marked_P1 = is_after_PD.sum(axis=1, keepdims=True)
    sums = is_after_PD @ flat
    gaps = sums / marked_P1 - (flat.sum(axis=0) - sums) / (documents - marked_P1)
    largest: Counts = np.abs(gaps).reshape(-1, columns, grid).max(axis=2)
    return largest
