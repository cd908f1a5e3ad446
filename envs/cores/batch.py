"""What a step of many episodes gives.

Shape suffixes: B parallel episodes, K of them that ended, D observation columns,
V objectives of a reward vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from offramp.controller.features import BoolArray, FloatArray

RewardArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Finals:
    """The K episodes that ended in this step, in ascending order of place.

    Attributes:
        place_K: Which of the B parallel episodes, int64.
        obs_KD: The observation that the last action answered, float32.
        info: Columns [K] by name; the environments' docstrings tell which. Counts are int64, the
            rest float64.
    """

    place_K: IndexArray
    obs_KD: FloatArray
    info: dict[str, NDArray[Any]]

    def rows(self) -> list[dict[str, Any]]:
        """The info columns, and ``terminal_observation`` [D], as one dict per ended episode."""
        names = (*self.info, "terminal_observation")
        columns = zip(*(column.tolist() for column in self.info.values()), self.obs_KD, strict=True)
        return [dict(zip(names, row)) for row in columns]  # noqa: B905 - strict takes twice as long


class StepBatch(NamedTuple):
    """What one step of all B episodes gives; every array is new, never reused.

    Attributes:
        obs_BD: Next observations; of the next episode where one ended (with autoreset), float32.
        reward_B: Reward of each episode's step, float64.
        terminated_B: Where an episode ended.
        finals: About those that ended.
        vector_BV: The same reward by objective, unweighted: quality, −latency and, if the costs
            hold joules, −energy, float64.
    """

    obs_BD: FloatArray
    reward_B: RewardArray
    terminated_B: BoolArray
    finals: Finals
    vector_BV: RewardArray
