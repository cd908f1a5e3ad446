"""Stages whose shares are kept while they serve: a budget holds on texts that nobody has seen.

Shape suffixes: N rows, F features, C outlook columns, E exits, Q quantiles.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.errors import RequestError
from offramp.controller.features import FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import IndexArray, require_column
from offramp.controller.policies.rules.in_order import at_first, leave_or_next
from offramp.controller.strict import NUMBER, TEXT, list_of

GAIN = 0.02
"""Share by which one row too many raises a threshold."""


class KeptStages:
    """Leave at exit e if among the surest share of the rows asked there, and see to that share.

    ``StageThresholds`` sets its thresholds once, on texts it was fitted to; on others the shares
    are those texts'. Here every row that leaves beyond its exit's share raises that exit's
    threshold, and every row short of it lowers it: the integral feedback by which Gibbs and Candès
    2021 (adaptive conformal inference, arXiv 2106.00170, section 2) keep a miscoverage rate. So
    after n rows at an exit, whatever they are, the rows that left are off by at most 1 / gain and
    one batch (their proposition 4.1), and mean costs follow.

    Args:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The score, higher is surer.
        shares: Share of the rows asked at each exit that are to leave there, in [0, 1].
        scores_EQ: Quantiles of the score among the rows asked at each exit, ascending, evenly
            spaced from 0 to 1.
        gain: Quantile by which a threshold rises per row too many, positive.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no such column, or a parameter is out of range or shape.
    """

    def __init__(
        self,
        *,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        column: str,
        shares: tuple[float, ...],
        scores_EQ: ArrayLike,
        gain: float = GAIN,
        candidates_VK: IntArray | None = None,
    ) -> None:
        require_column(schema, column)
        self.exits, self.schema, self.column = exits, schema, column
        self.shares, self.gain = shares, gain
        self.scores_EQ = np.asarray(scores_EQ, np.float32)
        self.candidates_VK = candidates_VK
        if len(shares) != len(exits) or not all(0 <= each <= 1 for each in shares):
            raise RequestError("shares", f"{shares} are not one in [0, 1] for each exit")
        rows, levels = self.scores_EQ.shape if self.scores_EQ.ndim == 2 else (0, 0)
        if rows != len(exits) or levels < 2 or (np.diff(self.scores_EQ) < 0).any():
            raise RequestError("scores_EQ", "are no ascending quantiles, two or more per exit")
        if not gain > 0:
            raise RequestError("gain", f"{gain} is not positive", "Use a few hundredths")
        self._levels_Q = np.linspace(0.0, 1.0, levels)
        self.rewind()

    def rewind(self) -> None:
        """Forget who left: begin with the thresholds that were fitted."""
        self.excess_E = np.zeros(len(self.exits))

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Asked at the first exit, [N]."""
        return at_first(outlook_NC)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Rows whose score reaches this exit's present threshold leave, [N]; they are counted."""
        score_N = features_NF[:, self.schema.index(self.column)]
        leave_N = score_N >= self._threshold(here)
        self.excess_E[here] += np.count_nonzero(leave_N) - self.shares[here] * len(score_N)
        return leave_or_next(here, leave_N)

    def _threshold(self, here: int) -> np.float32:
        level = 1 - self.shares[here] + self.gain * self.excess_E[here]
        if level <= 0:
            return np.float32(-math.inf)
        if level >= 1:
            return np.float32(math.inf)
        return np.float32(np.interp(level, self._levels_Q, self.scores_EQ[here]))


KEPT_STAGES = Kind(
    name="kept_stages",
    type=KeptStages,
    params={"column": TEXT, "shares": list_of(NUMBER), "gain": NUMBER},
    tensors=("scores",),
    attributes={"scores": "scores_EQ"},
)
