"""AdaEE-like: a bandit that picks the confidence threshold while serving.

Shape suffixes: N rows, F features, A arms, E exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import Verdict, require_column
from offramp.controller.strict import NUMBER, TEXT, list_of


class ThresholdBandit:
    """UCB1 over a few thresholds: the arm in force decides until full depth has spoken.

    Pacheco et al. 2023 (AdaEE) and Ju et al. 2021: each arm is a confidence threshold, the index
    of an arm is its mean reward + β · sqrt(ln t / n), with n pulls of it in t (Auer et al. 2002).
    Their reward is the gain in confidence less the cost of offloading. Here full depth's opinion
    is known for tokens that were deferred or verified, so the reward of a token is the one our
    environment pays: agreement − λ · cost. One pull is what lies between two deep passes: the
    early tokens, and the deep one, with which full depth always agrees.

    Verdicts do not say which row they are of. With several rows a pull may hold tokens of the arm
    before.

    Args:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The confidence compared.
        thresholds: The arms, A of them.
        trade_off: λ, what a full-depth token's time is worth.
        costs: Cost of leaving at each exit and of full depth, in units of a full-depth token,
            E + 1 of them.
        explore: β, at least 0.
        counts_A, sums_A: Pulls of each arm so far, and their rewards summed; zeros to start with.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no such column, or numbers do not match.
    """

    def __init__(
        self,
        *,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        column: str,
        thresholds: tuple[float, ...],
        trade_off: float,
        costs: tuple[float, ...],
        explore: float = 0.1,
        counts_A: ArrayLike | None = None,
        sums_A: ArrayLike | None = None,
        candidates_VK: IntArray | None = None,
    ) -> None:
        require_column(schema, column)
        arms = len(thresholds)
        self.exits = exits
        self.schema = schema
        self.column = column
        self.thresholds = thresholds
        self.trade_off = trade_off
        self.costs = costs
        self.explore = explore
        self.counts_A = np.zeros(arms) if counts_A is None else np.array(counts_A, np.float64)
        self.sums_A = np.zeros(arms) if sums_A is None else np.array(sums_A, np.float64)
        self.candidates_VK = candidates_VK
        lengths = (len(self.counts_A), len(self.sums_A), len(costs))
        if not arms or lengths != (arms, arms, len(exits) + 1):
            raise RequestError(
                "thresholds", f"{arms} arms and {len(exits)} exits do not fit {lengths}"
            )
        self.arm = self._choose()

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose confidence reaches the threshold in force, [N]."""
        column_N = features_NF[:, self.schema.index(self.column)]
        return np.asarray(column_N >= np.float32(self.thresholds[self.arm]))

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """End this pull, book its mean reward, and choose the next arm."""
        rewards = [float(v.agreed) - self.trade_off * self.costs[v.exit_index] for v in verdicts]
        rewards.append(1.0 - self.trade_off * self.costs[-1])
        self.counts_A[self.arm] += 1
        self.sums_A[self.arm] += sum(rewards) / len(rewards)
        self.arm = self._choose()

    def _choose(self) -> int:
        untried = np.flatnonzero(self.counts_A == 0)
        if len(untried):
            return int(untried[0])
        bonus_A = np.sqrt(math.log(self.counts_A.sum()) / self.counts_A)
        return int(np.argmax(self.sums_A / self.counts_A + self.explore * bonus_A))


THRESHOLD_BANDIT = Kind(
    name="threshold_bandit",
    type=ThresholdBandit,
    params={
        "column": TEXT,
        "thresholds": list_of(NUMBER),
        "trade_off": NUMBER,
        "costs": list_of(NUMBER),
        "explore": NUMBER,
        "counts": list_of(NUMBER),
        "sums": list_of(NUMBER),
    },
    attributes={"counts": "counts_A", "sums": "sums_A"},
)
