"""Adapter layers: a decoder layer of its own after an exit, in front of the shared norm and head.

A model that was never trained to exit lacks computation at its early exits, not a basis. A layer
trained for an exit supplies some (Liu et al. 2024, Kangaroo, arXiv 2404.18911, section 3.2). It
stands in the stack behind the model's own layers, so it has cache entries like any of them; the
model's layers never read what it computes. ``offramp tune --kind layer`` trains them.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.controller.adapters.adapter_folder import AGAIN, read_description
from offramp.controller.errors import ConfigError
from offramp.worker.model.filling.kv_map import UNMAPPED, KVMap, take_kv_map
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import (
    UNTRANSLATED,
    ExitTranslators,
    exits_of,
    read_weights,
    save_exits,
)

KIND = "layer"
"""What the description of a folder says that holds them."""

SHARED = "shared"
"""Begins the names of tensors that belong to the layers of all exits."""

NARROWEST = 32
"""Inner units of a layer without an MLP: their weights are 0, and compiled code runs them all the
same."""


class AdapterLayers:
    """Adapter layers of a stack that belong together, by the layer they follow.

    Args:
        stack: Holds them, behind its own layers.
        by_layer: Layers are counted from 1, as exits are.
        digest: SHA-256 of the file they were loaded from; "" if from none.
        places: Indices that they have among the stack's layers, by exit. Whoever gives them puts
            the layers there; without, they are put behind those that are there.
        kv_map: What skipped layers are filled through.

    Attributes:
        layers: Index of the adapter layer after an exit, by exit.
    """

    def __init__(
        self,
        stack: LayerStack,
        by_layer: Mapping[int, nn.Module],
        digest: str = "",
        places: Mapping[int, int] | None = None,
        kv_map: KVMap = UNMAPPED,
    ) -> None:
        self.digest = digest
        self.kv_map = kv_map
        self._stack = stack
        self._by_layer = dict(sorted(by_layer.items()))
        behind = dict(zip(self._by_layer, itertools.count(len(stack.blocks)), strict=False))
        self.layers: dict[int, int] = dict(behind if places is None else places)
        for layer, block in self._by_layer.items():
            modules: list[Any] = list(block.modules())
            for module in modules:
                if hasattr(module, "layer_idx"):  # where its attention writes in the cache
                    module.layer_idx = self.layers[layer]
            if places is None:
                stack.blocks.append(block)

    @classmethod
    def together(cls, parts: Sequence[AdapterLayers]) -> AdapterLayers:
        """Put sets of one stack together, each of other layers."""
        by_layer = {layer: block for part in parts for layer, block in part._by_layer.items()}
        places = {layer: place for part in parts for layer, place in part.layers.items()}
        return cls(parts[0]._stack, by_layer, places=places)

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers that have one, ascending."""
        return tuple(self._by_layer)

    def apply(self, layer: int, x_TD: Tensor) -> Tensor:
        """What norm, head and probes read after ``layer`` layers of a whole text, [T, D].

        Where the layer has no adapter this is ``x_TD`` itself, not a copy.
        """
        index = self.layers.get(layer)
        if index is None:
            return x_TD
        positions_1T = torch.arange(len(x_TD), device=x_TD.device)[None]
        rotary = self._stack.rotary(x_TD[None], positions_1T)
        return self._stack.run_layers(index, index + 1, x_TD[None], rotary, None, None)[0]

    def correct(self, layer: int, x_ND: Tensor) -> Tensor:
        """The states themselves while tokens are decoded: the layer has run in their wave."""
        return x_ND

    def to(self, dtype: torch.dtype, device: torch.device | str) -> AdapterLayers:
        """Copy to another dtype and device, behind the same layers."""
        stack = copy.copy(self._stack)
        stack.blocks = self._stack.blocks[: stack.layers]
        own = self._by_layer.items()
        moved = {layer: copy.deepcopy(each).to(device, dtype) for layer, each in own}
        return AdapterLayers(stack, moved, kv_map=self.kv_map)

    def save(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write them as float32; see ``ExitTranslators.save``.

        With ``shared`` in the description they are one layer behind several exits, kept once.
        """
        blocks = {str(layer): block for layer, block in self._by_layer.items()}
        if description.get(SHARED):
            blocks = {SHARED: next(iter(blocks.values()))}
        tensors = {
            f"{layer}.{name}": tensor
            for layer, block in blocks.items()
            for name, tensor in block.state_dict().items()
        }
        save_exits(folder, tensors, {"kind": KIND, **description, "exits": list(self.exits)})


def fresh_layer(stack: LayerStack, inner: int | None = None) -> nn.Module:
    """A copy of the model's last layer, in float32: where an adapter begins.

    Args:
        stack: The model.
        inner: Inner width of its MLP, of which the units that speak loudest stay; None: the
            model's; 0: there is none, as in Kangaroo's adapter (Liu et al. 2024, section 3.2).

    Raises:
        ConfigError: the inner width is beyond the model's, or its MLP is of another form.
    """
    layer = copy.deepcopy(stack.last_layer).float()
    if inner is not None:
        _narrow(layer, inner)
    return layer


@torch.no_grad()
def _narrow(layer: Any, inner: int) -> None:
    mlp: Any = getattr(layer, "mlp", None)
    parts: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(part, nn.Linear) for part in parts):
        problem = "is for layers whose MLP has gate_proj, up_proj and down_proj"
        raise ConfigError("inner", problem, "Leave it out")
    gate, up, down = parts
    if not 0 <= inner <= down.in_features or inner % NARROWEST:
        raise ConfigError(
            "inner",
            f"{inner} is no multiple of {NARROWEST} from 0 to {down.in_features}",
            f"Try {down.in_features // 4 // NARROWEST * NARROWEST}, or 0 for no MLP",
        )
    kept = down.weight.norm(dim=0).topk(max(inner, NARROWEST)).indices.sort().values
    gate.weight = nn.Parameter(gate.weight[kept].contiguous())
    up.weight = nn.Parameter(up.weight[kept].contiguous())
    down.weight = nn.Parameter(down.weight[:, kept].contiguous())
    for part in (gate, up):
        part.out_features = len(kept)
        if part.bias is not None:
            part.bias = nn.Parameter(part.bias[kept].contiguous())
    down.in_features = len(kept)
    if inner == 0:
        for part in parts:  # at 0 there is no gradient either: they stay
            for values in part.parameters():
                values.zero_()


def twin_of(layer: nn.Module) -> nn.Module:
    """Another layer with the same weights, not copies of them: it has a cache of its own."""
    return copy.deepcopy(layer, {id(each): each for each in layer.parameters()})


ExitAdapters = ExitTranslators | AdapterLayers
"""What exits are read through."""


def load_exits(folder: Path | None, stack: LayerStack, fingerprint: str) -> ExitAdapters:
    """Read what ``offramp tune`` wrote; adapter layers join the stack, which is not prepared yet.

    Args:
        folder: None gives translators that change nothing.
        stack: The model that they were fitted to.
        fingerprint: Names that model; what was fitted to another is refused.

    Raises:
        ConfigError: as ``ExitTranslators.load``.
    """
    if folder is None:
        return UNTRANSLATED
    facts = read_description(folder)
    if facts.get("kind") == KIND:
        blocks, kv_map = read_layers(folder, stack, fingerprint)
        return AdapterLayers(stack, blocks, str(facts["digest"]), kv_map=kv_map)
    return load_translators(folder, stack, fingerprint)


def load_translators(folder: Path, stack: LayerStack, fingerprint: str) -> ExitTranslators:
    """Read translators for a stack's model.

    Raises:
        ConfigError: as ``ExitTranslators.load``.
    """
    return ExitTranslators.load(
        folder,
        fingerprint,
        stack.layers,
        stack.width,
        stack.dtype,
        stack.device,
        values=stack.kv_heads * stack.head_dim,
    )


def read_layers(
    folder: Path, stack: LayerStack, fingerprint: str
) -> tuple[dict[int, nn.Module], KVMap]:
    """Read adapter layers in the stack's dtype, by exit, and the map of the fill beside them.

    They do not belong to the stack yet.

    Raises:
        ConfigError: as ``ExitTranslators.load``.
    """
    facts = read_description(folder)
    exits = exits_of(folder, facts, fingerprint, stack.layers)
    tensors = read_weights(folder, facts)
    widths = stack.width, stack.kv_heads * stack.head_dim
    kv_map = take_kv_map(folder, tensors, exits, stack.layers, widths)
    names: tuple[int | str, ...] = (SHARED,) if facts.get(SHARED) else exits
    found = {name: fresh_layer(stack, facts.get("inner")) for name in names}
    expected = {
        f"{layer}.{name}": tensor
        for layer, block in found.items()
        for name, tensor in block.state_dict().items()
    }
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ConfigError("translators", f"{folder} lacks, or should not have, {odd}", AGAIN)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.isfinite().all():
            raise ConfigError("translators", f"{name} is misshapen or not finite", AGAIN)
    for layer, block in found.items():
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        block.load_state_dict(own)
        block.to(stack.device, stack.dtype).requires_grad_(False)
    if SHARED in found:
        return {layer: twin_of(found[SHARED]) for layer in exits}, kv_map
    return {layer: found[layer] for layer in exits}, kv_map
