"""The candidate probe's arithmetic for the rows of a wave, their policy's included, compiled.

Shape suffixes: S places for rows, N rows that are asked, K candidates, D width, V vocabulary, F
features, M numbers remembered of a row, J followers; 2 a norm's weight and bias.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from offramp.controller.features import FloatArray
from offramp.controller.policies.candidate_table import merge_row
from offramp.controller.policies.drafts.leads import odds_by_lead
from offramp.controller.policies.net_kernel import best_of, compiled, outputs_of
from offramp.worker.model.kernels.floats import pointer
from offramp.worker.probes.candidates.kernel import COLUMNS, begin, row_columns, widen

POSITION, LAST, FOLLOWERS = range(3)
"""What a row begins with: its position, its last token, and its own candidates (-1 is none)."""


@compiled
def begin_rows(
    table_VK: Any,
    context: int,
    starts_NJ: Any,
    states: tuple[int, int],
    is_bits: bool,
    at_S: Any,
    candidates_SK: Any,
    last_SD: Any,
    memory_SM: Any,
) -> None:
    """All that the probe of N rows starts from, in one go; the last four are written.

    Args:
        table_VK: The successor table.
        context: Longest position, for the scale.
        starts_NJ: See POSITION and its neighbours, int32.
        states: Address of the first row's embedding, and bytes from row to row.
        is_bits: Whether embeddings are bits of bfloat16, or float32.
        at_S: Where each row that is asked is kept.
        candidates_SK: What to score.
        last_SD: The state of the last probe.
        memory_SM: See BEST and its neighbours.
    """
    for n in range(len(starts_NJ)):
        at_S[n] = n
        start_J = starts_NJ[n]
        merge_row(table_VK[start_J[LAST]], start_J[FOLLOWERS:], candidates_SK[n])
        place = np.float32(start_J[POSITION] / context)
        here = pointer(states[0] + n * states[1])
        width = last_SD.shape[1]
        if is_bits:
            begin(carray(here, width, np.uint16), True, place, last_SD[n], memory_SM[n])
        else:
            begin(carray(here, width, np.float32), False, place, last_SD[n], memory_SM[n])


@compiled
def fused_features(
    head_VD: Any,
    norm: tuple[Any, float, bool],
    are_bits: tuple[bool, bool],
    exits: int,
    at_S: Any,
    candidates_SK: Any,
    last_SD: Any,
    memory_SM: Any,
    states: tuple[int, int],
    rows: int,
    depth: float,
) -> FloatArray:
    """CANDIDATES_V1 of some rows, [N, F]; what is remembered of them is updated.

    Args:
        states: Address of the first row's state, and bytes from row to row.
        rows: Number N of rows.
        head_VD, norm, are_bits, exits, depth: See ``candidate_features``.
        at_S, candidates_SK, last_SD, memory_SM: What ``begin_rows`` wrote.
    """
    width, scored = last_SD.shape[1], candidates_SK.shape[1]
    out_NF = np.empty((rows, COLUMNS), np.float32)
    x_D = np.empty(width, np.float32)
    x_u = x_D.view(np.uint32)
    spare = (np.empty(width, np.float32), np.empty(width, np.float32), np.empty(scored, np.float32))
    for n in range(rows):
        here = pointer(states[0] + n * states[1])
        if are_bits[1]:
            widen(carray(here, width, np.uint16), True, x_u, x_D)
        else:
            widen(carray(here, width, np.float32), False, x_u, x_D)
        at = at_S[n]
        row_columns(
            head_VD, are_bits[0], candidates_SK[at], x_D, norm, last_SD[at], memory_SM[at], depth,
            exits, spare, out_NF[n],
        )  # fmt: skip
    return out_NF


@compiled
def fused_decision(
    head_VD: Any,
    norm: tuple[Any, float, bool],
    are_bits: tuple[bool, bool],
    exits: int,
    at_S: Any,
    candidates_SK: Any,
    last_SD: Any,
    memory_SM: Any,
    states: tuple[int, int],
    rows: int,
    depth: float,
    flat: Any,
    sizes: Any,
    threshold: float,
    gone_S: Any,
) -> int:
    """Which rows an ``MlpPolicy`` lets leave, and for which it is of no use; they are forgotten.

    Args:
        flat, sizes, threshold: The policy's weights in one array, its widths and its threshold.
        gone_S: Where the places among the N rows go: n of one that leaves, −1 − n of one whose
            features or logit are not finite.
        head_VD, norm, are_bits, exits, at_S, candidates_SK, last_SD, memory_SM, states, rows,
            depth: As ``fused_features`` takes them.

    Returns:
        How many are gone.
    """
    features_NF = fused_features(
        head_VD, norm, are_bits, exits, at_S, candidates_SK, last_SD, memory_SM, states, rows, depth
    )
    gone = 0
    for n in range(rows):
        logit = outputs_of(features_NF[n], flat, sizes)[0]
        if not np.isfinite(logit):
            gone_S[gone] = -1 - n
            gone += 1
        elif logit > threshold:
            gone_S[gone] = n
            gone += 1
        else:
            at_S[n - gone] = at_S[n]
    return gone


@compiled
def fused_route(
    head_VD: Any,
    norm: tuple[Any, float, bool],
    are_bits: tuple[bool, bool],
    exits: int,
    at_S: Any,
    candidates_SK: Any,
    last_SD: Any,
    memory_SM: Any,
    states: tuple[int, int],
    rows: int,
    depth: float,
    known_C: Any,
    line: tuple[float, float],
    scale: float,
    flat: Any,
    sizes: Any,
    mask_A: Any,
) -> tuple[int, float]:
    """Where a ``DraftRouter`` sends the one row that is asked.

    Args:
        known_C: Outlook of the row, and trust behind it.
        line: Intercept and slope of the log-odds that its draft is right, by its lead.
        scale: Divides log-odds where the net reads them.
        flat, sizes, mask_A: The net's weights in one array, its widths, and which actions lead on.
        head_VD, norm, are_bits, exits, at_S, candidates_SK, last_SD, memory_SM, states, rows,
            depth: As ``fused_features`` takes them.

    Returns:
        The best action, −1 if a logit is not finite, and the log-odds.
    """
    features_NF = fused_features(
        head_VD, norm, are_bits, exits, at_S, candidates_SK, last_SD, memory_SM, states, rows, depth
    )
    odds = odds_by_lead(features_NF[0, 0], features_NF[0, 1], line)
    outlook = known_C.size - 1
    x_I = np.empty(COLUMNS + outlook + 2, np.float32)
    x_I[:COLUMNS] = features_NF[0]
    x_I[COLUMNS : COLUMNS + outlook] = known_C[:outlook]
    x_I[COLUMNS + outlook] = odds / scale
    x_I[COLUMNS + outlook + 1] = known_C[outlook]
    return best_of(x_I, flat, sizes, mask_A), odds
