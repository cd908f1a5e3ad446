"""Which open drafts of an episode take part in a launch, and which of them lack entries.

Shape suffixes: B parallel episodes, K some of them, L layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.envs.cores.batch import IndexArray


class OpenDrafts:
    """Counts the open drafts of B episodes, layer by layer.

    Args:
        num_envs: Number B of parallel episodes.
        layers: Number of layers L.
    """

    def __init__(self, num_envs: int, layers: int) -> None:
        self._layers = layers
        self._layer_L = np.arange(layers)
        # That take part when the newest token runs a layer.
        self._joined_BL = np.zeros((num_envs, layers), np.int64)
        # Without an entry at a layer, which the copy's next draft will read.
        self._missing_BL = np.zeros((num_envs, layers), np.int64)

    def begin(self, place_K: IndexArray) -> None:
        """A cycle begins: no draft is open."""
        self._joined_BL[place_K] = 0
        self._missing_BL[place_K] = 0

    def left(self, place_K: IndexArray, depth_K: IndexArray, own_K: IndexArray) -> IndexArray:
        """A token left after so many layers, of which so many are the model's own.

        Returns:
            Entries that are filled at once: those above an exit on the copy, [K].
        """
        below_KL = self._layer_L < own_K[:, None]
        # All that are open have come this far, so none of them runs a shallower layer again.
        self._joined_BL[place_K] = np.where(below_KL, 0, self._joined_BL[place_K] + 1)
        on_copy_K = own_K < depth_K
        lacking_KL = np.where(below_KL, 0, self._missing_BL[place_K] + 1)
        self._missing_BL[place_K] = np.where(on_copy_K[:, None], 0, lacking_KL)
        return np.where(on_copy_K, self._layers - depth_K, 0)

    def filled(self, place_K: IndexArray) -> IndexArray:
        """The copy is about to draft: how many entries are filled for it, [K]."""
        missing_K: IndexArray = self._missing_BL[place_K].sum(1)
        self._missing_BL[place_K] = 0
        return missing_K

    def launched(
        self, place_K: IndexArray, start_K: IndexArray, end: IndexArray | int
    ) -> tuple[NDArray[np.bool_], IndexArray]:
        """Which layers run from a depth to another, and with how many drafts, [K, L] each."""
        last_K1 = np.broadcast_to(end, start_K.shape)[:, None]
        runs_KL = (self._layer_L >= start_K[:, None]) & (self._layer_L < last_K1)
        return runs_KL, self._joined_BL[place_K]
