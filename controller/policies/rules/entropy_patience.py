"""DeeBERT's entropy and PABEE's patience: two rules on what the whole head says at each exit.

Shape suffixes: N rows, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import SOFTMAX_V2, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.protocols import require_column, require_threshold
from offramp.controller.strict import COUNT, NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyExit:
    """Leave when the entropy of the exit's distribution is below a threshold.

    Xin et al. 2020 (DeeBERT), section 3 and algorithm 1: exit at the first off-ramp whose entropy
    is below S. Theirs is in nats; ours is divided by ln V, or ln k with a schema of k tokens.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: A schema with an ``entropy`` column.
        threshold: S, in [0, 1].
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema has no entropy.
    """

    exits: tuple[int, ...]
    threshold: float
    schema: FeatureSchema = SOFTMAX_V2
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_column(self.schema, "entropy")
        require_threshold(self.threshold)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose entropy is below the threshold, [N]."""
        return np.asarray(features_NF[:, self.schema.index("entropy")] < self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatienceExit:
    """Leave when the exits have agreed on the best token often enough in a row.

    Zhou et al. 2020 (BERT Loses Patience), section 3: a counter rises by one whenever an exit's
    prediction is that of the exit before, falls to 0 otherwise, and the row leaves when it reaches
    the patience t. Only exits at which we ask are counted.

    Attributes:
        exits: Layers to ask after, ascending.
        patience: t, from 1 to the number of exits − 1.
        schema: A schema with a ``run_length`` column.
        candidates_VK: Needed by the candidate probe only.

    Raises:
        RequestError: the schema counts no runs, or the patience cannot be reached.
    """

    exits: tuple[int, ...]
    patience: int
    schema: FeatureSchema = SOFTMAX_V2
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_column(self.schema, "run_length")
        if not 1 <= self.patience < len(self.exits):
            raise RequestError(
                "patience",
                f"{self.patience} cannot be reached with {len(self.exits)} exits",
                f"Use 1 to {len(self.exits) - 1}",
            )

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Rows whose counter has reached the patience, [N]."""
        run_N = features_NF[:, self.schema.index("run_length")] * len(self.exits)
        return np.asarray(np.rint(run_N) >= self.patience)


ENTROPY = Kind(name="entropy", type=EntropyExit, params={"threshold": NUMBER})
PATIENCE = Kind(name="patience", type=PatienceExit, params={"patience": COUNT})
