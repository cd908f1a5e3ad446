"""FREE: a threshold estimated while serving, from two Beta distributions of the confidence.

Shape suffixes: N rows, F features; 2 for tokens that disagreed and agreed with full depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind, Params, PolicyParts, Tensors
from offramp.controller.policies.protocols import Verdict, require_column
from offramp.controller.strict import NUMBER, SHARE, TEXT, list_of

Moments = NDArray[np.float64]
"""Count, sum and sum of squares of a confidence, by class, [2, 3]."""

GRID = np.linspace(0.005, 0.995, 199)
"""Confidences at which the posterior is evaluated."""

LEAST_COUNT, LEAST_VARIANCE = 4.0, 1e-6
"""With fewer samples, or less spread, a class has no Beta distribution."""


class BetaThreshold:
    """Leave when the confidence is one at which full depth agrees with posterior above ζ.

    Bae et al. 2023 (FREE), section 4.3: the confidences of tokens on which the exit and full depth
    agree, and of those on which they do not, are two Beta distributions, fitted by the method of
    moments, α = m (m (1 − m) / s² − 1) and β = α (1 − m) / m. The threshold is the least
    confidence above which the likelihood of "agree" over both is greater than ζ everywhere. Full
    depth's opinion on deferred or verified tokens keeps updating them.

    FREE sees every token's confidence; verdicts only know tokens that left early. So the moments
    start from training traces, where all are known, and old ones fade as verdicts come in.

    Args:
        exits: Layers to ask after; FREE has one.
        schema: The schema that holds the column.
        column: The confidence, in [0, 1].
        zeta: ζ; 0.4 in the paper.
        moments_23: Count, sum and sum of squares of the confidences of disagreeing (first) and
            agreeing (second) tokens.
        fallback: The threshold while a class has too few tokens.
        memory: Share of the moments kept at each verdict, in [0, 1]; 1 forgets nothing.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no such column, or the moments have another shape.
    """

    def __init__(
        self,
        *,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        column: str,
        zeta: float,
        moments_23: Moments,
        fallback: float = 0.9,
        memory: float = 0.999,
        candidates_VK: IntArray | None = None,
    ) -> None:
        require_column(schema, column)
        if moments_23.shape != (2, 3):
            raise RequestError("moments_23", f"has shape {moments_23.shape}, not (2, 3)")
        self.exits = exits
        self.schema = schema
        self.column = column
        self.zeta = zeta
        self.moments_23 = moments_23.astype(np.float64)
        self.fallback = fallback
        self.memory = memory
        self.candidates_VK = candidates_VK
        self.threshold = self._estimate()

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose confidence reaches the threshold of the moment, [N]."""
        return np.asarray(features_NF[:, self.schema.index(self.column)] >= self.threshold)

    def learn(self, verdicts: Sequence[Verdict]) -> None:
        """Add the verdicts to the moments and estimate the threshold anew."""
        place = self.schema.index(self.column)
        for verdict in verdicts:
            confidence = float(verdict.features_F[place])
            self.moments_23 *= self.memory
            self.moments_23[int(verdict.agreed)] += (1.0, confidence, confidence**2)
        if verdicts:
            self.threshold = self._estimate()

    def _estimate(self) -> float:
        fits = [beta_parameters(each) for each in self.moments_23]
        if fits[0] is None or fits[1] is None:
            return self.fallback
        log_ratio = _log_density(*fits[1]) - _log_density(*fits[0])
        posterior = 1 / (1 + np.exp(-np.clip(log_ratio, -50, 50)))
        below = np.flatnonzero(posterior <= self.zeta)
        if not len(below):
            return 0.0
        return float(GRID[below[-1] + 1]) if below[-1] + 1 < len(GRID) else 1.0


def moments_of(confidences_N: FloatArray, agreed_N: BoolArray) -> Moments:
    """Count, sum and sum of squares by class, [2, 3]."""
    rows = [confidences_N[agreed_N == flag].astype(np.float64) for flag in (False, True)]
    return np.array([(len(x), x.sum(), (x**2).sum()) for x in rows], np.float64)


def beta_parameters(moments_3: Moments) -> tuple[float, float] | None:
    """α and β by the method of moments; None with too few or too equal samples."""
    count, total, squares = moments_3
    if count < LEAST_COUNT:
        return None
    mean = min(max(total / count, 1e-4), 1 - 1e-4)
    variance = max(squares / count - mean**2, LEAST_VARIANCE)
    alpha = mean * (mean * (1 - mean) / variance - 1)
    if alpha <= 0:  # wider than any Beta distribution
        return None
    return alpha, alpha * (1 - mean) / mean


def _log_density(alpha: float, beta: float) -> NDArray[np.float64]:
    constant = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    return np.asarray(constant + (alpha - 1) * np.log(GRID) + (beta - 1) * np.log1p(-GRID))


def _describe(policy: BetaThreshold) -> tuple[Params, Tensors]:
    numbers = {name: float(getattr(policy, name)) for name in ("zeta", "fallback", "memory")}
    moments = policy.moments_23.ravel().tolist()
    return {"column": policy.column, **numbers, "moments": moments}, {}


def _build(parts: PolicyParts) -> BetaThreshold:
    params = dict(parts.params)
    moments = np.asarray(params.pop("moments"), np.float64)
    if len(moments) != 6:
        raise RequestError("moments", f"are {len(moments)} numbers, not 6")
    return BetaThreshold(
        exits=parts.exits,
        schema=parts.required_schema,
        moments_23=moments.reshape(2, 3),
        candidates_VK=parts.candidates_VK,
        **params,
    )


BETA_THRESHOLD = Kind(
    name="beta_threshold",
    type=BetaThreshold,
    params={
        "column": TEXT,
        "zeta": SHARE,
        "fallback": NUMBER,
        "memory": SHARE,
        "moments": list_of(NUMBER),
    },
    describe=_describe,
    build=_build,
)
