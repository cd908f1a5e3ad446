"""Adapter layers: a decoder layer of its own after an exit, in front of the shared norm and head.

A model that was never trained to exit lacks computation at its early exits, not a basis. A layer
trained for an exit supplies some (Liu et al. 2024, Kangaroo, arXiv 2404.18911, section 3.2). It
stands in the stack behind the model's own layers, so it has cache entries like any of them; the
model's layers never read what it computes. ``offramp tune --kind layer`` trains them.

Shape suffixes: T tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.controller.errors import ConfigError
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import (
    AGAIN,
    UNTRANSLATED,
    ExitTranslators,
    exits_of,
    read_description,
    read_weights,
    save_exits,
)

KIND = "layer"
"""What the description of a folder says that holds them."""


class AdapterLayers:
    """The adapter layers of a stack, by the layer they follow.

    Args:
        stack: Gets them, behind its own layers.
        by_layer: Layers are counted from 1, as exits are.
        digest: SHA-256 of the file they were loaded from; "" if from none.
    """

    def __init__(
        self, stack: LayerStack, by_layer: Mapping[int, nn.Module], digest: str = ""
    ) -> None:
        self.digest = digest
        self._stack = stack
        for layer, block in sorted(by_layer.items()):
            modules: list[Any] = list(block.modules())
            for module in modules:
                if hasattr(module, "layer_idx"):  # where its attention writes in the cache
                    module.layer_idx = len(stack.blocks)
            stack.adapters[layer] = len(stack.blocks)
            stack.blocks.append(block)

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers that have one, ascending."""
        return tuple(self._stack.adapters)

    def apply(self, layer: int, x_TD: Tensor) -> Tensor:
        """What norm, head and probes read after ``layer`` layers of a whole text, [T, D].

        Where the layer has no adapter this is ``x_TD`` itself, not a copy.
        """
        positions_1T = torch.arange(len(x_TD), device=x_TD.device)[None]
        rotary = self._stack.rotary(x_TD[None], positions_1T)
        return self._stack.read(layer, x_TD[None], rotary, None, None)[0]

    def to(self, dtype: torch.dtype, device: torch.device | str) -> AdapterLayers:
        """Copy to another dtype and device, behind the same layers."""
        stack = copy.copy(self._stack)
        stack.blocks, stack.adapters = self._stack.blocks[: stack.layers], {}
        own = {layer: self._stack.blocks[index] for layer, index in self._stack.adapters.items()}
        return AdapterLayers(
            stack, {layer: copy.deepcopy(each).to(device, dtype) for layer, each in own.items()}
        )

    def save(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write them as float32; see ``ExitTranslators.save``."""
        tensors = {
            f"{layer}.{name}": tensor
            for layer, index in self._stack.adapters.items()
            for name, tensor in self._stack.blocks[index].state_dict().items()
        }
        save_exits(folder, tensors, {"kind": KIND, **description, "exits": list(self.exits)})


def fresh_layer(stack: LayerStack) -> nn.Module:
    """A copy of the stack's last layer, in float32: where an adapter begins."""
    return copy.deepcopy(stack.blocks[stack.layers - 1]).float()


def load_exits(
    folder: Path | None, stack: LayerStack, fingerprint: str
) -> ExitTranslators | AdapterLayers:
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
    if facts.get("kind") != KIND:
        return ExitTranslators.load(
            folder, fingerprint, stack.layers, stack.width, stack.dtype, stack.device
        )
    exits = exits_of(folder, facts, fingerprint, stack.layers)
    tensors = read_weights(folder, facts)
    blocks = {layer: fresh_layer(stack) for layer in exits}
    expected = {
        f"{layer}.{name}": tensor
        for layer, block in blocks.items()
        for name, tensor in block.state_dict().items()
    }
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ConfigError("translators", f"{folder} lacks, or should not have, {odd}", AGAIN)
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.isfinite().all():
            raise ConfigError("translators", f"{name} is misshapen or not finite", AGAIN)
    for layer, block in blocks.items():
        prefix = f"{layer}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        block.load_state_dict(own)
        block.to(stack.device, stack.dtype).requires_grad_(False)
    return AdapterLayers(stack, blocks, str(facts["digest"]))
