"""SkipDecode: the exit depends on the position in the completion alone.

Shape suffixes: N rows, F features, C outlook columns, E exits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.policies.rules.decay import ROUNDING
from offramp.controller.policies.rules.in_order import progress
from offramp.controller.strict import NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSchedule:
    """The depth falls linearly from ``deepest`` to ``shallowest`` along the completion.

    Del Corro et al. 2023 (SkipDecode), section 3: one exit point for all rows of a position, which
    never rises with it, decaying linearly between a maximum and a minimum of layers. They bypass
    lower and middle layers and always run the topmost; here a row leaves early. It takes the
    shallowest exit that runs at least as many layers as the schedule says, all layers if none
    does. No probe.

    Attributes:
        exits: Layers at which rows may leave, ascending.
        deepest: Layers at the first token, at least ``shallowest``.
        shallowest: Layers at the last token it may have, at least 1.

    Raises:
        RequestError: the depths are out of order.
    """

    exits: tuple[int, ...]
    deepest: float
    shallowest: float
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.shallowest <= self.deepest:
            raise RequestError(
                "shallowest", f"{self.shallowest} is not from 1 to deepest, {self.deepest}"
            )

    def depths(self, outlook_NC: FloatArray) -> FloatArray:
        """Layers that the schedule says, [N]."""
        fall = self.deepest - self.shallowest
        return np.asarray(self.deepest - fall * progress(outlook_NC), np.float32)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """The exit of each row's position; E for all layers, [N]."""
        return np.searchsorted(np.asarray(self.exits, np.float32), self.depths(outlook_NC))

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Everybody leaves where they were sent, [N]."""
        return np.full(len(features_NF), here)


def _clear(policy: PositionSchedule, _features_NF: FloatArray, outlook_NC: FloatArray) -> BoolArray:
    distances_NE = policy.depths(outlook_NC)[:, None] - np.asarray(policy.exits, np.float32)
    return np.asarray((np.abs(distances_NE) > ROUNDING).all(axis=1))


POSITION_SCHEDULE = Kind(
    name="position_schedule",
    type=PositionSchedule,
    params={"deepest": NUMBER, "shallowest": NUMBER},
    needs_schema=False,
    clear=_clear,
)
