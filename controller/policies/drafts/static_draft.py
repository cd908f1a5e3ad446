"""A fixed exit and a fixed number of drafts: the baseline of every self-speculation.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.features import MAX_PENDING, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.policies.drafts.drafter import open_drafts, require_exits, require_length
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.strict import COUNT


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticDraft:
    """Drafts ``length`` tokens after ``layer`` layers, then verifies, as in LayerSkip.

    Elhoushi et al. 2024, arXiv 2404.16710, section 3.3: exit E and d speculations.

    Attributes:
        layer: Layers executed for a draft.
        length: Drafts per cycle.
        max_pending: The engine's.
    """

    layer: int
    length: int
    max_pending: int = MAX_PENDING
    schema: None = None
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        require_exits(self.exits)
        require_length(self.length, self.max_pending)

    @property
    def exits(self) -> tuple[int, ...]:
        """The one exit."""
        return (self.layer,)

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Draft until the length is reached."""
        full_N = open_drafts(outlook_NC, self.max_pending) >= self.length
        return full_N.astype(np.int64)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Everybody leaves."""
        return np.full(len(features_NF), here, np.int64)


STATIC = Kind(
    name="draft-static",
    type=StaticDraft,
    params={"length": COUNT, "max_pending": COUNT},
    build=lambda parts: StaticDraft(layer=parts.only_exit, **parts.params),
)
