"""What skipped layers are filled through: a map of the exit's state, or the state as it is.

Shape suffixes: L layers not executed, D width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class ExitMap(NamedTuple):
    """What each layer behind one exit is taken to read, by the exit's state after the norm, u.

    Of layer l that is u + B_l (A u) + b_l, before the norm's own weight and bias.

    Attributes:
        A_rD: Reads the state; shared by all layers.
        B_LDr: Moves it, for each layer not executed.
        b_LD: Shifts it.
    """

    A_rD: Tensor
    B_LDr: Tensor
    b_LD: Tensor


class KVMap:
    """What skipped layers are filled through, by exit; at any other the state counts as it is.

    ``offramp tune --kv`` fits it. Only the fill reads it, so layers that run never see it.

    Args:
        by_exit: Layers are counted from 1; float32.
    """

    def __init__(self, by_exit: Mapping[int, ExitMap] | None = None) -> None:
        self.by_exit = dict(sorted((by_exit or {}).items()))

    def tensors(self) -> dict[str, Tensor]:
        """What a folder of adapters holds of it, by name."""
        return {
            f"{KV}{layer}.{part[0]}": tensor
            for layer, each in self.by_exit.items()
            for part, tensor in each._asdict().items()
        }


KV = "kv."
"""How the names of its tensors begin."""

UNMAPPED = KVMap()
"""Every skipped layer is filled as if the exit's state had reached it unchanged."""
