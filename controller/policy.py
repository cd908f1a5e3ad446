"""Exit policies: who may leave, after which layer.

Shape suffixes: N rows asked at once, F feature columns, V vocabulary, K candidates per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray


@runtime_checkable
class ExitPolicy(Protocol):
    """Decides, after each of its exits, which rows leave.

    Attributes:
        exits: Numbers of executed layers after which to ask, ascending; () never asks.
        schema: The features it reads; None if it reads none.
        candidates_VK: For the candidate probe: likely next tokens of each token; else None.
    """

    @property
    def exits(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def schema(self) -> FeatureSchema | None: ...  # noqa: D102

    @property
    def candidates_VK(self) -> IntArray | None: ...  # noqa: D102

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Which of the N rows leave here. The result may be a view that the next call reuses."""
        ...


@dataclass(frozen=True, slots=True)
class NeverExit:
    """Full depth for every token: the baseline, and the fallback whenever in doubt."""

    exits: tuple[int, ...] = ()
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Nobody leaves."""
        return np.zeros(len(features_NF), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class FixedExit:
    """Every token leaves after the same layer (the static baseline of every exit paper).

    Attributes:
        layer: Number of executed layers, at least 1.
    """

    layer: int
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise RequestError("layer", f"{self.layer} is below 1", "Name a layer from 1 on")

    @property
    def exits(self) -> tuple[int, ...]:
        """The one exit."""
        return (self.layer,)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Everybody leaves."""
        return np.ones(len(features_NF), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class ThresholdPolicy:
    """Leave when one feature reaches a threshold.

    With SOFTMAX_V1 and column ``margin`` this is CALM's softmax measure (Schuster et al. 2022,
    section 3.3) with a constant threshold.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The feature compared.
        threshold: Leave if the feature is at least this.
        candidates_VK: Needed by the candidate probe only.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema
    column: str
    threshold: float
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        if self.column not in self.schema.columns:
            raise RequestError(
                "column",
                f"schema {self.schema.name!r} has no column {self.column!r}",
                f"Choose one of {', '.join(self.schema.columns)}",
            )

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose column is at least the threshold."""
        column_N = features_NF[:, self.schema.index(self.column)]
        return np.asarray(column_N >= self.threshold)
