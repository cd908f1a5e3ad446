"""By how much a draft's logit leads: what says best whether it is right.

Shape suffix: N rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.features import FloatArray
from offramp.controller.policies.net_kernel import compiled
from offramp.controller.traces import SOFTMAX_COLUMNS

MARGIN = SOFTMAX_COLUMNS.index("margin")
"""Column of best minus second best probability, in SOFTMAX_V2 and CANDIDATES_V1 as well."""

MOST_LEAD = 8.0
"""A longer lead counts as this: no draft with half of it is ever wrong."""

LEAST = 1e-9
"""A smaller probability counts as this."""

MOST_ODDS = 8.0
"""Longer log-odds count as this: a draft that is wrong once in 3,000."""


def leads_of(top1_N: ArrayLike, margin_N: ArrayLike) -> FloatArray:
    """By how much the best logit leads the second best: ln(p₁ / p₂), at most ``MOST_LEAD``.

    Full depth disagrees with a copy in fewer bytes where rounding turned two logits that were
    close, and with an earlier layer where two tokens were open: of all columns this one says it
    best (docs/lossless.md).

    >>> leads_of([0.6, 0.5, 1.0], [0.3, 0.0, 1.0]).round(2).tolist()
    [0.6899999976158142, 0.0, 8.0]
    """
    top1_N = np.maximum(np.asarray(top1_N, np.float64), LEAST)
    second_N = np.clip(top1_N - margin_N, top1_N * math.exp(-MOST_LEAD), top1_N)
    return np.log(top1_N / second_N).astype(np.float32)


@compiled
def odds_by_lead(top1: Any, margin: Any, line: tuple[float, float]) -> float:
    """Log-odds that one draft is right, by its lead, within ±``MOST_ODDS``; compiled.

    Args:
        top1, margin: Its probability, and by how much that is above the second best.
        line: Intercept and slope of the log-odds.
    """
    best = max(float(top1), LEAST)
    second = min(max(best - float(margin), best * math.exp(-MOST_LEAD)), best)
    odds = line[0] + line[1] * math.log(best / second)
    return min(max(odds, -MOST_ODDS), MOST_ODDS)
