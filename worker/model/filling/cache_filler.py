"""Writes what exited tokens skipped into the cache, together for each depth and map.

Shape suffixes: N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.worker.model.filling.kv_map import UNMAPPED, KVMap
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.kv import SlotKV


class ExitedToken(NamedTuple):
    """A token that left early and whose skipped layers have no keys and values yet.

    Attributes:
        slot: Slot of its row in the cache.
        position: Position of the token in its row.
        depth: Layers executed so far.
        state_D: Its hidden state there.
        kv_map: What its row is filled through.
    """

    slot: int
    position: int
    depth: int
    state_D: Tensor
    kv_map: KVMap = UNMAPPED


class CacheFiller:
    """Writes projected keys and values of exited tokens into the cache.

    Args:
        kv: Cache that is written to.
        projector: Projects exit states; None leaves the cache's invariant broken, as the tests'
            negative control needs it.
    """

    def __init__(self, kv: SlotKV, projector: KVProjector | None) -> None:
        self._kv = kv
        self._projector = projector

    def fill(self, tokens: Sequence[ExitedToken]) -> None:
        """Fill all layers that the tokens skipped, together for each depth and map.

        Those that left earlier first: a map may read, of the token before, what its fill wrote.
        """
        if self._projector is None:
            return
        together: dict[tuple[int, int], list[ExitedToken]] = {}
        for token in tokens:
            together.setdefault((token.depth, id(token.kv_map)), []).append(token)
        for (depth, _), group in sorted(together.items()):
            self._fill_from(depth, group)

    def _fill_from(self, depth: int, tokens: Sequence[ExitedToken]) -> None:
        x_ND = torch.stack([token.state_D for token in tokens])
        slots, positions = zip(*((token.slot, token.position) for token in tokens), strict=True)
        self.fill_states(depth, x_ND, slots, positions, tokens[0].kv_map)

    def fill_states(
        self,
        depth: int,
        x_ND: Tensor,
        slots: Sequence[int] | NDArray[np.int64],
        positions: Sequence[int] | NDArray[np.int64],
        kv_map: KVMap,
    ) -> None:
        """Fill the layers from ``depth`` on for tokens that left there, together.

        Args:
            depth: Layers that they executed.
            x_ND: Their states there.
            slots, positions: Where each stands in the cache, N of each.
            kv_map: What they are filled through.
        """
        if self._projector is None:
            return
        places_2N = np.array((slots, positions), np.int64)
        self._projector.fill(x_ND, depth, places_2N, self._kv, kv_map)

    def keep_next(
        self,
        depth: int,
        x_ND: Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        kv_map: KVMap,
    ) -> None:
        """Write early what the next layer keeps of tokens that go on, for a map that reads it."""
        if self._projector is not None:
            places_2N = np.array((slots, positions), np.int64)
            self._projector.fill_one(x_ND, depth, places_2N, self._kv, kv_map)
