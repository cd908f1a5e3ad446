"""How likely a row's open drafts are all right: *trust*, by which drafters stop.

Shape suffixes: N rows, C columns of outlook, E exits; 2 the intercept and the slope of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.errors import RequestError
from offramp.controller.features import FloatArray
from offramp.controller.policies.drafts.draft_insight import DraftInsight
from offramp.controller.policies.drafts.drafter import ACCEPTANCE, PENDING, TOP1, open_drafts
from offramp.controller.policies.drafts.leads import (
    LEAST,
    MARGIN,
    MOST_ODDS,
    leads_of,
    odds_by_lead,
)
from offramp.controller.policies.protocols import Seen
from offramp.controller.traces import SOFTMAX_COLUMNS

ODDS_SCALE = 4.0
"""Divides log-odds where nets read them."""


def odds_of_top1(top1_N: ArrayLike) -> FloatArray:
    """Log-odds of top-1 probabilities, within ±``MOST_ODDS``."""
    top1_N = np.clip(np.asarray(top1_N, np.float64), LEAST, 1 - LEAST)
    return clipped(np.log(top1_N / (1 - top1_N)))


def chances_of(odds_N: FloatArray) -> FloatArray:
    """Chances in (0, 1) of log-odds."""
    return np.asarray(1 / (1 + np.exp(-odds_N)), np.float32)


class DraftChances:
    """How likely a draft is right: at each exit a logistic function of its lead, and of insight.

    Args:
        lines: For each exit the intercept and the slope of the log-odds, [E, 2].
        exits: Layers of the exits.
        insight: Adds to the log-odds what the state and the text tell; None: the lead is all.

    Raises:
        RequestError: not two finite numbers for each of the exits, or an insight of other exits.
    """

    def __init__(
        self, lines: ArrayLike, exits: Sequence[int], insight: DraftInsight | None = None
    ) -> None:
        self.line_E2 = np.ascontiguousarray(lines, np.float32)
        if self.line_E2.shape != (len(exits), 2) or not np.isfinite(self.line_E2).all():
            raise RequestError("lines", f"{lines!r} are no two numbers for each of {exits}")
        if insight is not None and insight.exits != len(exits):
            raise RequestError("insight", f"is of {insight.exits} exits, not of {len(exits)}")
        self.exits, self.insight = tuple(exits), insight
        self.lines: list[tuple[float, float]] = [(a, b) for a, b in self.line_E2.tolist()]
        odds_by_lead(0.5, 0.0, self.lines[0])  # compiled when a policy arrives

    def part(self, exits: Sequence[int]) -> DraftChances:
        """Chances of some of the exits, which are named by their layers."""
        places = [self.exits.index(layer) for layer in exits]
        insight = None if self.insight is None else self.insight.part(places)
        return DraftChances(self.line_E2[places], exits, insight)

    def odds(self, here: int, sure_NS: FloatArray, seen: Seen | None = None) -> FloatArray:
        """Log-odds of drafts of an exit, within ±``MOST_ODDS``, [N].

        Args:
            here: Index of the exit.
            sure_NS: SOFTMAX_COLUMNS; further columns are not read.
            seen: What insight reads; None goes by the lead alone.
        """
        intercept, slope = self.lines[here]
        odds_N = intercept + slope * leads_of(sure_NS[:, 0], sure_NS[:, MARGIN])
        if self.insight is not None and seen is not None:
            odds_N = odds_N + self.insight.more(here, sure_NS[:, : len(SOFTMAX_COLUMNS)], seen)
        return clipped(odds_N)

    def odds_of_one(self, here: int, top1: float, margin: float) -> float:
        """The same of one draft by its lead: numpy's calls cost more than the arithmetic."""
        odds: float = odds_by_lead(top1, margin, self.lines[here])
        return odds


def clipped(odds_N: NDArray[Any]) -> FloatArray:
    """Log-odds within ±``MOST_ODDS``."""
    return np.asarray(np.clip(odds_N, -MOST_ODDS, MOST_ODDS), np.float32)


class DraftTrust:
    """Follows trust: the product of the open drafts' chances of being right.

    A request asked one row at a time, under its own policy object, has it followed here; where
    several rows are asked at once, or the count of open drafts shows that another row's got in
    between, trust is estimated as acceptance to the power of the open drafts. Output is full
    depth's in any case; only speed depends on it.

    Args:
        max_pending: The engine's.
    """

    def __init__(self, max_pending: int) -> None:
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

    def add(self, odds: float) -> None:
        """The row that is asked alone leaves with a draft of such log-odds."""
        self._trust_1[0] *= 1 / (1 + math.exp(-odds))
        self._drafts += 1


class TrustingPolicy:
    """A drafter that reads trust.

    ``start`` and ``route`` take it, and ``route`` the odds of the drafts at hand, where the caller
    follows them, as a replay of many rows does. Else these are computed here; with insight,
    ``route`` is given what that reads.

    Args:
        max_pending: The engine's.
        chances: How likely a draft is right; None: as its top-1 probability says.
    """

    def __init__(self, max_pending: int, chances: DraftChances | None) -> None:
        self.max_pending = max_pending
        self.chances = chances
        self.trust = DraftTrust(max_pending)

    @property
    def reads_state(self) -> bool:
        """Whether ``route`` is to be given the states and the tokens that were read."""
        return self.chances is not None and self.chances.insight is not None

    def odds(self, here: int, features_NF: FloatArray, seen: Seen | None = None) -> FloatArray:
        """Log-odds that drafts of an exit are right, [N]."""
        if self.chances is None:
            return odds_of_top1(features_NF[:, TOP1])
        if len(features_NF) == 1 and (seen is None or self.chances.insight is None):
            top1, margin = float(features_NF[0, TOP1]), float(features_NF[0, MARGIN])
            return np.array([self.chances.odds_of_one(here, top1, margin)], np.float32)
        return self.chances.odds(here, features_NF, seen)

    def _trust_of(self, outlook_NC: FloatArray, trust_N: FloatArray | None) -> FloatArray:
        return self.trust.of(outlook_NC) if trust_N is None else trust_N
