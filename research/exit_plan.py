"""A plan for one completion: which token leaves where. For oracles and tests; never released.

Shape suffixes: N rows, F features, C outlook columns, T tokens of the completion, E exits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.features import OUTLOOK_V1, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.policies.rules.in_order import TOKENS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedExit:
    """The n-th token of the completion leaves where the plan says, without a probe.

    Attributes:
        exits: Layers at which rows may leave, ascending.
        plan_T: Index into the exits for each step, E for all layers; later tokens run them all.
    """

    exits: tuple[int, ...]
    plan_T: IndexArray
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """The planned exit of each row's step; E for all layers, [N]."""
        step_N = np.rint(outlook_NC[:, OUTLOOK_V1.index("step")] * TOKENS).astype(np.int64)
        inside_N = step_N < len(self.plan_T)
        planned_N = self.plan_T[np.minimum(step_N, len(self.plan_T) - 1)]
        return np.where(inside_N, planned_N, len(self.exits))

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Everybody leaves where they were sent, [N]."""
        return np.full(len(features_NF), here)
