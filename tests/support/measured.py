"""Policies as if measured: so much lost, so much time taken."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.measure import PairedCosts
from offramp.agents.evaluation.scores import Scores
from offramp.agents.placing.contenders import Contender
from offramp.controller.policies.protocols import FixedExit, NeverExit

DOCUMENTS = 6


def measured(
    family: Any,
    loss: float,
    wall: float,
    seed: int | None = None,
    setting: float | None = 0.5,
    timed: int = DOCUMENTS,
) -> Measured:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 100, size=DOCUMENTS).astype(float)
    scores = Scores(
        tokens_D=tokens, agreeing_D=(1 - loss) * tokens, right_D=0.5 * tokens,
        surprisal_D=(1 + loss) * tokens, lines_D=np.full(DOCUMENTS, 4.0),
        exact_D=np.ones(DOCUMENTS), similarity_D=2.0 * np.full(DOCUMENTS, 1 - loss),
        depths={6: 30, 12: 10},
    )  # fmt: skip
    full = rng.uniform(1, 2, size=timed)
    contender = Contender(
        family=family,
        setting=setting,
        offline_agreement=None if setting is None else 1 - loss / 2,
        policy=NeverExit() if setting is None else FixedExit(6),
    )
    return Measured(contender, seed, scores, PairedCosts(wall * full, full))


FULL = measured("full depth", 0.0, 1.0, setting=None)
