"""Tokens some of whose layers have not run.

Shape suffix: D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from offramp.controller.features import FloatArray

UNPROBED = (-1, np.empty(0, np.float32))
"""Where an audited token left that no policy learns from."""


@dataclass(slots=True)
class OpenToken:
    """A token some of whose layers have not run.

    Attributes:
        position: Where it stands in its row.
        depth: Layers executed so far.
        state_D: Its hidden state there; None before the embedding.
        is_underway: Whether it may yet go on by itself: it has not left.
        left_at: Index of the exit where it left and what was probed there, if its policy learns.
        is_filled: Whether the layers above have entries of it that a copy's drafts may read.
    """

    position: int
    depth: int
    state_D: Tensor | None
    is_underway: bool = True
    left_at: tuple[int, FloatArray] | None = None
    is_filled: bool = False

    def has_left(self, index: int) -> bool:
        """Whether it left the stack before the layer with this index; 0 is no exit."""
        return 0 < self.depth <= index and not self.is_underway
