"""EERO-like: one threshold per exit, set so that a share of the tokens leaves there.

Shape suffixes: N rows, F features, C outlook columns, E exits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import IndexArray, require_column, require_threshold
from offramp.controller.policies.rules.in_order import at_first, leave_or_next
from offramp.controller.strict import NUMBER, TEXT, list_of

NEVER = 2.0
"""A threshold that no share reaches: nobody leaves at this exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageThresholds:
    """Leave at exit e when a column reaches that exit's own threshold, else be rejected onwards.

    Valade, Hebiri and Gay 2024 (EERO, arXiv 2402.03779): each exit is a classifier with a reject
    option that keeps the share of instances whose score is highest. How the shares come from a
    budget is ``research/fitting/budget.py``.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The schema that holds the column.
        column: The score, higher is surer.
        thresholds: One per exit; NEVER for none.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no such column, or there is not one threshold per exit.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema
    column: str
    thresholds: tuple[float, ...]
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_column(self.schema, self.column)
        for threshold in self.thresholds:
            require_threshold(threshold)
        if len(self.thresholds) != len(self.exits):
            raise RequestError(
                "thresholds", f"are {len(self.thresholds)}, for {len(self.exits)} exits"
            )

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Asked at the first exit, [N]."""
        return at_first(outlook_NC)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Rows whose score reaches this exit's threshold leave, [N]."""
        score_N = features_NF[:, self.schema.index(self.column)]
        return leave_or_next(here, score_N >= np.float32(self.thresholds[here]))


STAGE_THRESHOLDS = Kind(
    name="stage_thresholds",
    type=StageThresholds,
    params={"column": TEXT, "thresholds": list_of(NUMBER)},
)
