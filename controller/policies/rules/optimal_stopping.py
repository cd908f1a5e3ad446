"""Optimal stopping: leave where that is worth more than what going on is expected to bring.

Shape suffixes: N rows, F features, C outlook columns, E exits, P terms of the polynomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import CLOSE_LOGIT, Kind
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.policies.rules.in_order import at_first, leave_or_next

FURTHEST = np.float32(4.0)
"""Standard deviations beyond which a feature counts as this far: squares grow fast."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoppingPolicy:
    """Leave at exit e when the fitted advantage of leaving there is positive.

    Backward induction with the continuation value by regression (Longstaff and Schwartz 2001,
    section 2): the advantage is a polynomial of degree 2 in the features, one per exit.
    ``research/fitting/backward_induction.py`` fits it.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The features read.
        mean_F, std_F: Normalise the features.
        weights_EP: Coefficients of ``terms``.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: shapes that do not fit the schema and the exits.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema
    mean_F: FloatArray
    std_F: FloatArray
    weights_EP: FloatArray
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        width = self.schema.width
        expected = ((width,), (width,), (len(self.exits), (width + 1) * (width + 2) // 2))
        found = (self.mean_F.shape, self.std_F.shape, self.weights_EP.shape)
        if found != expected:
            raise RequestError("weights_EP", f"shapes {found} do not fit {expected}")

    def advantages(self, here: int, features_NF: FloatArray) -> FloatArray:
        """Expected return of leaving here minus that of going on, [N]."""
        terms_NP = terms(features_NF, self.mean_F, self.std_F)
        return np.asarray(terms_NP @ self.weights_EP[here])

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Asked at the first exit, [N]."""
        return at_first(outlook_NC)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Rows with a positive advantage leave, [N].

        Raises:
            PolicyFaultError: an advantage is not finite.
        """
        advantages_N = self.advantages(here, features_NF)
        if not np.isfinite(advantages_N).all():
            raise PolicyFaultError("an advantage is not finite")
        return leave_or_next(here, advantages_N > 0)


def terms(features_NF: FloatArray, mean_F: FloatArray, std_F: FloatArray) -> FloatArray:
    """1, every normalised feature, and every product of two, [N, P]."""
    ones_NF = np.ones((len(features_NF), len(mean_F) + 1), np.float32)
    ones_NF[:, 1:] = np.clip((features_NF - mean_F) / std_F, -FURTHEST, FURTHEST)
    left, right = np.triu_indices(len(mean_F) + 1)
    return np.asarray(ones_NF[:, left] * ones_NF[:, right])


def _clear(policy: StoppingPolicy, features_NF: FloatArray, _outlook_NC: FloatArray) -> BoolArray:
    exits = range(len(policy.exits))
    advantages = [np.abs(policy.advantages(here, features_NF)) for here in exits]
    return np.asarray(np.min(advantages, axis=0) > CLOSE_LOGIT)


STOPPING = Kind(
    name="stopping",
    type=StoppingPolicy,
    tensors=("mean", "std", "weights"),
    attributes={"mean": "mean_F", "std": "std_F", "weights": "weights_EP"},
    clear=_clear,
)
