"""The learned policy: a small multi-layer perceptron in preallocated numpy.

Shape suffixes: N rows, F features.
"""

from __future__ import annotations

import math

import numpy as np

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import (
    CLOSE_LOGIT,
    Kind,
    PolicyParts,
    pack_layers,
    unpack_layers,
)
from offramp.controller.policies.net import MAX_ROWS, TanhNet, Weights
from offramp.controller.strict import NUMBER


class MlpPolicy:
    """Leave when a tanh MLP's single output exceeds a threshold.

    Buffers are preallocated, so a decision allocates nothing; one instance serves one thread.

    Attributes:
        flat, sizes: The weights for compiled code, as ``TanhNet`` lays them out.

    Args:
        exits: Layers to ask after, ascending.
        schema: The features read; F = schema.width.
        weights: One (weight [in, out], bias [out]) pair per layer, float32; the last has out = 1.
        threshold: In logits; the row leaves if output > threshold.
        candidates_VK: Candidate table for the candidate probe, or None.

    Raises:
        RequestError: shapes that do not chain from F to 1.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        weights: Weights,
        threshold: float = 0.0,
        candidates_VK: IntArray | None = None,
    ) -> None:
        self._net = TanhNet(weights, inputs=schema.width, outputs=1)
        self.exits = exits
        self.schema = schema
        self.threshold = threshold
        self.candidates_VK = candidates_VK
        self._leave = np.empty(MAX_ROWS, np.bool_)
        self._leave_1 = self._leave[:1]
        self.flat, self.sizes = self._net.flat, self._net.sizes

    @property
    def weights(self) -> list[tuple[FloatArray, FloatArray]]:
        """One pair per layer."""
        return self._net.weights

    def at(self, threshold: float) -> MlpPolicy:
        """The same net with another threshold."""
        return MlpPolicy(self.exits, self.schema, self.weights, threshold, self.candidates_VK)

    def logits(self, features_NF: FloatArray) -> FloatArray:
        """The MLP's output per row, [N]; a view that the next call reuses (N ≤ MAX_ROWS)."""
        return self._net.rows(features_NF)[:, 0]

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose logit exceeds the threshold; a view that the next call reuses.

        Raises:
            PolicyFaultError: a logit is not finite, so the features were not, or overflowed.
        """
        rows = len(features_NF)
        if rows == 1:
            logit = float(self._net.row(features_NF[0])[0])
            _require_finite(logit)
            self._leave_1[0] = logit > self.threshold
            return self._leave_1
        if rows > MAX_ROWS:
            half = rows // 2
            head = self.leave(features_NF[:half]).copy()
            return np.concatenate([head, self.leave(features_NF[half:])])
        logits_N = self.logits(features_NF)
        # NaN or infinite wherever one of them is; a sum of squares costs less than np.isfinite.
        _require_finite(float(logits_N.dot(logits_N)))
        return np.greater(logits_N, self.threshold, out=self._leave[:rows])


def _require_finite(value: float) -> None:
    if not math.isfinite(value):
        raise PolicyFaultError(f"logits sum up to {value}")


def _build(parts: PolicyParts) -> MlpPolicy:
    weights = unpack_layers(parts.tensors)
    threshold = parts.params["threshold"]
    return MlpPolicy(parts.exits, parts.required_schema, weights, threshold, parts.candidates_VK)


def _clear(policy: MlpPolicy, features_NF: FloatArray, _outlook_NC: FloatArray) -> BoolArray:
    # One row at a time: so that the logit is the one that a lone row gets.
    distances = [abs(policy.logits(row[None])[0] - policy.threshold) for row in features_NF]
    return np.asarray(distances) > CLOSE_LOGIT


MLP = Kind(
    name="mlp",
    type=MlpPolicy,
    params={"threshold": NUMBER},
    describe=lambda policy: ({"threshold": float(policy.threshold)}, pack_layers(policy.weights)),
    build=_build,
    clear=_clear,
)
