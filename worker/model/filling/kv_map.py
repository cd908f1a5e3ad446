"""What skipped layers are filled through: a map of the exit's state, or the state as it is.

Shape suffixes: L layers not executed, D width, K values of one layer, r rank; I inputs: D, or
D + K.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.controller.adapters.adapter_folder import AGAIN
from offramp.controller.errors import ConfigError


class ExitMap(NamedTuple):
    """What each layer behind one exit is taken to read, by the exit's state after the norm, u.

    Of layer l that is u + B_l (A u) + b_l, before the norm's own weight and bias. A map may also
    read v, the values that the first of these layers keeps of the token before (none: zeros): then
    it is u + B_l (A [u, v]) + b_l, and the first of the layers, which reads u itself, is not moved.

    Attributes:
        A_rI: Reads the state, or both; shared by all layers.
        B_LDr: Moves it, for each layer not executed.
        b_LD: Shifts it.
    """

    A_rI: Tensor
    B_LDr: Tensor
    b_LD: Tensor

    @property
    def reads_before(self) -> bool:
        """Whether it reads the token before."""
        return self.A_rI.shape[-1] > self.b_LD.shape[-1]


class KVMap:
    """What skipped layers are filled through, by exit; at any other the state counts as it is.

    ``offramp tune --kv`` fits it. Only the fill reads it, so layers that run never see it.

    Args:
        by_exit: Layers are counted from 1; float32.
    """

    def __init__(self, by_exit: Mapping[int, ExitMap] | None = None) -> None:
        self.by_exit = dict(sorted((by_exit or {}).items()))
        moves = {n: each.B_LDr.any() or each.b_LD.any() for n, each in self.by_exit.items()}
        self._moving = {layer: each for layer, each in self.by_exit.items() if moves[layer]}

    def tensors(self) -> dict[str, Tensor]:
        """What a folder of adapters holds of it, by name."""
        return {
            f"{KV}{layer}.{part}": tensor
            for layer, each in self.by_exit.items()
            for part, tensor in zip(PARTS, each, strict=True)
        }

    def at(self, layer: int) -> ExitMap | None:
        """What the fill at an exit is moved by; None: by nothing."""
        return self._moving.get(layer)

    def reads_before(self, layer: int) -> bool:
        """Whether the fill at an exit reads the token before."""
        return layer in self._moving and self._moving[layer].reads_before


KV = "kv."
"""How the names of its tensors begin."""

LARGEST = 1e18
"""Of states beyond it, squares overflow in float32; what a map reads has a mean square of 1."""

PARTS = ("A", "B", "b")
"""How they end, as those of translators do."""

UNMAPPED = KVMap()
"""Every skipped layer is filled as if the exit's state had reached it unchanged."""


def take_kv_map(
    folder: Path,
    tensors: dict[str, Tensor],
    exits: tuple[int, ...],
    layers: int,
    widths: tuple[int, int],
) -> KVMap:
    """Take the map of the fill out of a folder's tensors; without one, that which changes nothing.

    Args:
        folder: Named in errors.
        tensors: Its tensors, by name; the map's are taken out.
        exits: Layers that it has to have.
        layers: Layers of the model.
        widths: How wide a state is, and what a layer keeps of a token as values.

    Raises:
        ConfigError: field ``translators``; a tensor is missing, misshapen or not finite.
    """
    found = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(KV)}
    if not found:
        return UNMAPPED
    if odd := sorted({f"{KV}{layer}.{part}" for layer in exits for part in PARTS} ^ found.keys()):
        raise ConfigError("translators", f"{folder} lacks, or should not have, {odd}", AGAIN)
    by_exit = {}
    for layer in exits:
        by_exit[layer] = ExitMap(*(found[f"{KV}{layer}.{part}"] for part in PARTS))
        _check_map(layer, by_exit[layer], layers - layer, *widths)
    return KVMap(by_exit)


def _check_map(layer: int, exit_map: ExitMap, deeper: int, width: int, values: int) -> None:
    shapes = [tuple(part.shape) for part in exit_map]
    rank, inputs = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    is_known = inputs == width or (inputs == width + values and deeper > 1)
    if rank < 1 or not is_known or shapes[1:] != [(deeper, width, rank), (deeper, width)]:
        raise ConfigError(
            "translators",
            f"the map after exit {layer} has shapes {shapes}, not "
            f"[(r, {width} or {width + values}), ({deeper}, {width}, r), ({deeper}, {width})]",
            AGAIN,
        )
    if odd := {str(part.dtype) for part in exit_map if part.dtype is not torch.float32}:
        problem = f"the map after exit {layer} is of {', '.join(sorted(odd))}, not torch.float32"
        raise ConfigError("translators", problem, AGAIN)
    if not all(part.isfinite().all() for part in exit_map):
        problem = f"the map after exit {layer} holds NaN or infinite values"
        raise ConfigError("translators", problem, AGAIN)
    down, up = exit_map.A_rI.double().norm(), exit_map.B_LDr.double().norm()
    if max(down * up * inputs**0.5, exit_map.b_LD.abs().max()) > LARGEST:
        problem = f"the map after exit {layer} makes states so large that norms overflow"
        raise ConfigError("translators", problem, AGAIN)
    if exit_map.reads_before and (exit_map.B_LDr[0].any() or exit_map.b_LD[0].any()):
        problem = f"the map after exit {layer} reads the token before and moves its first layer"
        raise ConfigError("translators", problem, AGAIN)
