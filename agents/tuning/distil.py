"""Self-distillation of exits: by what full depth says, or by the state that it says it from.

The backbone is frozen and runs without gradients; each exit's loss depends on its own translator
alone, so exits are done one after the other and only one block of logits exists at a time.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
section 3 (affine translators per layer, the KL to the final distribution, identity at the start);
here the matrix is I + BA of low rank.

Shape suffixes: B rows, T tokens, N rows of any origin, D width, V tokens of the head, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from offramp.agents.tuning.exit_losses import (
    FEATURES,
    KL,
    KL_BESIDE_FEATURES,
    LossHead,
    blocks,
    exit_loss,
    feature_loss,
    typical_rows,
)
from offramp.worker.model.adapter_layers import AdapterLayers, fresh_layer, twin_of
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import ExitTranslators, Translator

SMALLEST_SCALE = 1e-6
"""Least scale of a state: below this, its unit would blow rounding up."""


class TrainableTranslator(nn.Module):
    """x + B (A x) + s·b, with float32 parameters and B = b = 0 at the start: the identity.

    The shift is trained in units of s, the state's typical size, so that one learning rate suits
    early layers (small states) and late ones (large). B A needs no unit: it is a ratio.

    Args:
        width: Width D of the states.
        rank: Rank r of the matrix added to the identity.
        scale: s, typical size of the states that the translator will meet.
        generator: Draws the start of A.
    """

    scale: Tensor

    def __init__(self, width: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        drawn_rD = torch.randn(rank, width, generator=generator) / math.sqrt(width)
        self.A = nn.Parameter(drawn_rD)
        self.B = nn.Parameter(torch.zeros(width, rank))
        self.b = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.tensor(max(scale, SMALLEST_SCALE)))

    @torch.no_grad()
    def begin_at(self, A_rD: Tensor, B_Dr: Tensor, b_D: Tensor) -> None:
        """Become x + B (A x) + b, where b is in the units of x."""
        self.A.copy_(A_rD)
        self.B.copy_(B_Dr)
        self.b.copy_(b_D.to(self.scale.device) / self.scale)

    def forward(self, x_ND: Tensor) -> Tensor:
        """The translated state, [N, D], in the dtype of the parameters."""
        x_ND = x_ND.to(self.A.dtype)
        return x_ND + linear(linear(x_ND, self.A), self.B, self.scale * self.b)

    def frozen(self) -> Translator:
        """What decoding uses: no gradient, the unit folded in."""
        with torch.no_grad():
            return Translator(self.A.clone(), self.B.clone(), self.scale * self.b)


class TrainableLayer(nn.Module):
    """An adapter layer in training, in float32: the model's last layer at the start.

    Its products are in the model's number format, as they will be when it is served.

    Args:
        stack: The model; not prepared.
        layer: The exit that it follows.
        length: Tokens T of a window; rows come window by window.
        inner: Inner width of its MLP; None: the model's.
        shared: The layer of another exit whose weights this one trains along; None: it has its own.
    """

    def __init__(
        self,
        stack: LayerStack,
        layer: int,
        length: int,
        inner: int | None = None,
        shared: TrainableLayer | None = None,
    ) -> None:
        super().__init__()
        begun = fresh_layer(stack, inner) if shared is None else twin_of(shared.block)
        self.block: nn.Module = begun.requires_grad_(True)
        self.adapters = AdapterLayers(stack, {layer: self.block})
        self._layer, self._length = layer, length
        self._products, self._mixes = stack.dtype, stack.dtype is torch.bfloat16

    def forward(self, x_ND: Tensor) -> Tensor:
        """What norm and head read, [N, D] float32."""
        windows = torch.split(x_ND.float(), self._length)
        with torch.autocast(x_ND.device.type, self._products, enabled=self._mixes):
            return torch.cat([self.adapters.apply(self._layer, x_TD) for x_TD in windows]).float()


def fresh_layers(
    stack: LayerStack, exits: Sequence[int], length: int, inner: int | None, shared: bool
) -> dict[int, Trainable]:
    """Adapter layers where they begin, one for each exit, or one for all."""
    first = TrainableLayer(stack, exits[0], length, inner)
    rest = {
        layer: TrainableLayer(stack, layer, length, inner, first if shared else None)
        for layer in exits[1:]
    }
    return {exits[0]: first, **rest}


Trainable = TrainableTranslator | TrainableLayer


def freeze(modules: Mapping[int, Trainable]) -> ExitTranslators | AdapterLayers:
    """The inference form of all of them, which are of one kind."""
    if layers := [each.adapters for each in modules.values() if isinstance(each, TrainableLayer)]:
        return AdapterLayers.together(layers)
    return ExitTranslators(
        {
            layer: each.frozen()
            for layer, each in modules.items()
            if isinstance(each, TrainableTranslator)
        }
    )


@torch.no_grad()
def states_at(
    stack: LayerStack, tokens_BT: Tensor, exits: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """States [B·T, D] after each exit and after the last layer, full depth, causal."""
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    x_BTD = stack.embed(tokens_BT, positions_BT)
    rotary = stack.rotary(x_BTD, positions_BT)
    states: dict[int, Tensor] = {}
    for index in range(stack.layers):
        x_BTD = stack.run_layer(index, x_BTD, rotary, None, None)
        if index + 1 in exits:
            states[index + 1] = x_BTD.flatten(0, 1)
    return states, x_BTD.flatten(0, 1)


def backward(
    stack: LayerStack,
    modules: Mapping[int, Trainable],
    tokens_BT: Tensor,
    head: LossHead | None = None,
    by: str = KL,
) -> dict[int, float]:
    """Add one batch's gradients to what is trained; mean KL per exit before the step, nats.

    The KL is over the tokens of ``head``; None: over all that the model has.
    """
    states, last_ND = states_at(stack, tokens_BT, tuple(modules))
    return backward_from(states, last_ND, modules, head or stack, by)


def backward_from(
    states: Mapping[int, Tensor],
    last_ND: Tensor,
    modules: Mapping[int, Trainable],
    head: LossHead,
    by: str = KL,
) -> dict[int, float]:
    """Do what ``backward`` does, from states [N, D] after each exit and after the last layer.

    By ``FEATURES`` gradients are those of the distance of states and a tenth of the KL; what is
    returned is the KL all the same, so that curves compare.
    """
    kept = {layer: typical_rows(each) for layer, each in states.items()}
    totals = dict.fromkeys(modules, 0.0)
    reads = {layer: module(states[layer]) for layer, module in modules.items()}
    # A layer needs whole windows and the head blocks: between them gradients are gathered.
    leaves = {layer: read_ND.detach().requires_grad_() for layer, read_ND in reads.items()}
    for part in blocks(len(last_ND), head.vocab):
        with torch.no_grad():
            final_NV = head.logits(last_ND[part]).float()
        for layer, leaf_ND in leaves.items():
            kept_N = kept[layer][part]
            read_ND, count = leaf_ND[part][kept_N], kept[layer].sum()
            loss = exit_loss(head, nn.Identity(), read_ND, final_NV[kept_N]) / count
            totals[layer] += loss.item()
            if by == FEATURES:
                distance = feature_loss(head, read_ND, last_ND[part][kept_N]) / count
                loss = distance + KL_BESIDE_FEATURES * loss
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
    for layer, read_ND in reads.items():
        read_ND.backward(leaves[layer].grad)
    return totals


def fresh_translators(
    stack: LayerStack, exits: Sequence[int], rank: int, tokens_BT: Tensor, seed: int
) -> dict[int, TrainableTranslator]:
    """Translators at the identity, each with the unit of its states on one batch.

    The same seed, model and batch give the same values on any device: A is drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    states, _ = states_at(stack, tokens_BT, exits)
    return {
        layer: TrainableTranslator(stack.width, rank, _typical_size(states[layer]), generator).to(
            stack.device
        )
        for layer in exits
    }


def _typical_size(x_ND: Tensor) -> float:
    """Median over rows of the root mean square of a state: sinks do not move it."""
    return x_ND.float().square().mean(-1).sqrt().median().item()
