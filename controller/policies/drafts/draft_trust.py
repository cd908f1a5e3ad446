"""How likely a row's open drafts are all right: *trust*, by which drafters stop.

Shape suffixes: N rows, C columns of outlook, E exits; 2 the intercept and the slope of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.errors import RequestError
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts.drafter import ACCEPTANCE, PENDING, TOP1, open_drafts

MARGIN = SOFTMAX_V2.index("margin")
"""Column of best minus second best probability, in CANDIDATES_V1 as well."""

MOST_LEAD = 8.0
"""A longer lead counts as this: no draft with half of it is ever wrong."""

LEAST = 1e-9
"""A smaller probability counts as this."""


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


class DraftChances:
    """How likely a draft is right: at each exit a logistic function of its lead.

    Args:
        lines: For each exit the intercept and the slope of the log-odds, [E, 2].

    Raises:
        RequestError: not two finite numbers for each of the exits.
    """

    def __init__(self, lines: ArrayLike, exits: Sequence[int]) -> None:
        self.line_E2 = np.ascontiguousarray(lines, np.float32)
        if self.line_E2.shape != (len(exits), 2) or not np.isfinite(self.line_E2).all():
            raise RequestError("lines", f"{lines!r} are no two numbers for each of {exits}")
        self._lines = self.line_E2.tolist()

    def of(self, here: int, top1_N: ArrayLike, margin_N: ArrayLike) -> FloatArray:
        """Chances of drafts of an exit, [N]."""
        intercept, slope = self._lines[here]
        odds_N = intercept + slope * leads_of(top1_N, margin_N)
        return np.asarray(1 / (1 + np.exp(-odds_N)), np.float32)

    def of_one(self, here: int, top1: float, margin: float) -> float:
        """The same of one draft, in scalars: a call of numpy costs more than the arithmetic."""
        top1 = max(top1, LEAST)
        second = min(max(top1 - margin, top1 * math.exp(-MOST_LEAD)), top1)
        intercept, slope = self._lines[here]
        odds = intercept + slope * math.log(top1 / second)
        return 1 / (1 + math.exp(-min(max(odds, -80.0), 80.0)))


class DraftTrust:
    """Follows trust: the product of the open drafts' chances of being right.

    A request asked one row at a time, under its own policy object, has it followed here; where
    several rows are asked at once, or the count of open drafts shows that another row's got in
    between, trust is estimated as acceptance to the power of the open drafts. Output is full
    depth's in any case; only speed depends on it.

    Args:
        max_pending: The engine's.
        chances: Says how likely a draft is right; None takes its top-1 probability.
    """

    def __init__(self, max_pending: int, chances: DraftChances | None) -> None:
        self.chances = chances
        self._max_pending = max_pending
        self._trust_1 = np.ones(1, np.float32)
        self._drafts = 0

    def of(self, outlook_NC: FloatArray) -> FloatArray:
        """Trust in the open drafts of each row, [N]; of one row a view that changes with it."""
        if len(outlook_NC) == 1:
            drafts = round(float(outlook_NC[0, PENDING]) * self._max_pending)
            if drafts == 0:
                self._trust_1[0], self._drafts = 1.0, 0
            if drafts == self._drafts:
                return self._trust_1
        drafts_N = open_drafts(outlook_NC, self._max_pending)
        estimate_N: FloatArray = outlook_NC[:, ACCEPTANCE] ** drafts_N.astype(np.float32)
        return estimate_N

    def add(self, here: int, features_F: FloatArray) -> None:
        """The row that is asked alone leaves this exit with a draft."""
        top1 = float(features_F[TOP1])
        if self.chances is not None:
            top1 = self.chances.of_one(here, top1, float(features_F[MARGIN]))
        self._trust_1[0] *= top1
        self._drafts += 1


class TrustingPolicy:
    """A drafter that reads trust.

    ``start`` and ``route`` take it as a last argument where the caller follows it, as a replay of
    many rows does.
    """

    def __init__(self, max_pending: int, chances: DraftChances | None) -> None:
        self.max_pending = max_pending
        self.trust = DraftTrust(max_pending, chances)

    @property
    def chances(self) -> DraftChances | None:
        """What trust is a product of; None: of top-1 probabilities."""
        return self.trust.chances

    def _trust_of(self, outlook_NC: FloatArray, trust_N: FloatArray | None) -> FloatArray:
        return self.trust.of(outlook_NC) if trust_N is None else trust_N
