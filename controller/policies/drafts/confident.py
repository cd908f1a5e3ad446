"""Drafts from one exit for as long as it is confident.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.features import (
    CANDIDATES_V1,
    MAX_PENDING,
    SOFTMAX_V2,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.codec import Kind, PolicyParts
from offramp.controller.policies.drafts.drafter import (
    TOP1,
    open_drafts,
    require_exits,
    require_length,
    require_share,
)
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.strict import COUNT, NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidentDraft:
    """Drafts until the top-1 probability falls below η as in Kangaroo.

    Liu et al. 2024, arXiv 2404.18911, section 3.3: stop once max p ≤ η, or after γ tokens.

    Where the paper stops after the unsure token and verifies it as a draft, here the token itself
    goes on to full depth, which settles it at no further launch.

    Attributes:
        layer: Layers executed for a draft.
        threshold: η, in [0, 1].
        length: γ, drafts per cycle at most.
        max_pending: The engine's.
        candidates_VK: Candidate table. With it, confidence is that among the candidates and the
            best of them is drafted, *headless*.
    """

    layer: int
    threshold: float
    length: int = MAX_PENDING
    max_pending: int = MAX_PENDING
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_exits(self.exits)
        require_length(self.length, self.max_pending)
        require_share("threshold", self.threshold)

    @property
    def headless(self) -> bool:
        """Whether it drafts the best candidate."""
        return self.candidates_VK is not None

    @property
    def schema(self) -> FeatureSchema:
        """What it reads."""
        return CANDIDATES_V1 if self.headless else SOFTMAX_V2

    @property
    def exits(self) -> tuple[int, ...]:
        """The one exit."""
        return (self.layer,)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Ask until the length is reached."""
        full_N = open_drafts(outlook_NC, self.max_pending) >= self.length
        return full_N.astype(np.int64)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Leave if confident, else verify."""
        return np.where(features_NF[:, TOP1] > self.threshold, here, here + 1)


def _build(parts: PolicyParts) -> ConfidentDraft:
    table_VK = parts.candidates_VK
    return ConfidentDraft(layer=parts.only_exit, candidates_VK=table_VK, **parts.params)


CONFIDENT = Kind(
    name="draft-confident",
    type=ConfidentDraft,
    params={"length": COUNT, "max_pending": COUNT, "threshold": NUMBER},
    build=_build,
)
