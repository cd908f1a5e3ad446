"""CALM: a confidence measure against a threshold that decays along the completion.

Shape suffixes: N rows, F features, C outlook columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import IndexArray, require_column, require_threshold
from offramp.controller.policies.rules.in_order import at_first, leave_or_next, progress
from offramp.controller.strict import NUMBER, TEXT

ROUNDING = 1e-5
"""Canned rows this near the threshold are dropped: exponentials round differently elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayingThreshold:
    """Leave when a column reaches λ · (9/10 + 1/10 · exp(−τ · t / N)).

    Schuster et al. 2022 (Confident Adaptive Language Modeling), equation 5, in the form in which
    both terms scale with λ. t is the step within the completion and N the most tokens it may
    have. The measures of section 3.3: ``margin`` of SOFTMAX_V2 is the softmax response (top1 −
    top2), ``top1`` the softmax maximum, ``cosine`` of STATE_V1 or CANDIDATES_V1 the saturation of
    the hidden state (to the last probe; at the first exit to the embedding).

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The confidence measure.
        threshold: λ, where it starts.
        decay: τ, at least 0; 0 is a constant threshold.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no such column, or τ is below 0.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema
    column: str
    threshold: float
    decay: float = 4.0
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_column(self.schema, self.column)
        require_threshold(self.threshold)
        if not self.decay >= 0:
            raise RequestError("decay", f"{self.decay} is below 0", "Use 0 for no decay")

    def thresholds(self, outlook_NC: FloatArray) -> FloatArray:
        """The threshold of each row at its step, [N]."""
        falling_N = 0.9 + 0.1 * np.exp(-self.decay * progress(outlook_NC))
        return np.asarray(self.threshold * falling_N, np.float32)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Asked at the first exit, [N]."""
        return at_first(outlook_NC)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Rows whose column reaches their threshold leave, [N]."""
        column_N = features_NF[:, self.schema.index(self.column)]
        return leave_or_next(here, column_N >= self.thresholds(outlook_NC))


def _clear(policy: DecayingThreshold, features_NF: FloatArray, outlook_NC: FloatArray) -> BoolArray:
    column_N = features_NF[:, policy.schema.index(policy.column)]
    return np.asarray(np.abs(column_N - policy.thresholds(outlook_NC)) > ROUNDING)


DECAYING_THRESHOLD = Kind(
    name="decaying_threshold",
    type=DecayingThreshold,
    params={"column": TEXT, "threshold": NUMBER, "decay": NUMBER},
    clear=_clear,
)
