"""Keys and values of skipped layers from an exit state: one GEMM for all remaining layers.

Shape suffixes: N rows, L layers filled, D width, G key/value heads, H head_dim,
R = L·2·G·H stacked output rows, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.controller.errors import ModelError
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.prepared import PackedWeight
from offramp.worker.model.products import Product, RecentProducts, can_pack
from offramp.worker.model.stack import KVWeights, LayerStack, Rotary
from offramp.worker.model.transfers import upload


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


class KVProjector:
    """The ``project`` mode of the cache: what each skipped layer would have stored, had the
    hidden state reached it unchanged (Schuster et al. 2022, CALM, section 3.2, state propagation),
    or as a map changes it.

    Every layer's input norm shares one root mean square (or one mean and variance), so its weight
    is folded into the stacked key and value matrices, and its bias into theirs; so is a map, which
    is why it starts behind that shared part of the norm, and costs nothing.

    Raises:
        ModelError: the layers' norms differ in kind or epsilon, so no single one serves all.
    """

    def __init__(self, stack: LayerStack) -> None:
        weights = [stack.kv_weights(index) for index in range(stack.layers)]
        _require_one_norm(weights)
        self.heads = stack.kv_heads
        self.head_dim = stack.head_dim
        self.centres = weights[0].norm == "layer"
        self.eps = weights[0].eps
        self.rows = 2 * stack.kv_heads * stack.head_dim
        self.weight_RD = torch.cat([_folded(each) for each in weights]).to(stack.dtype)
        self.bias_R = _stacked_bias(weights, stack.dtype)
        self._stack = stack
        # Of a map that no request is filled through any more they go with it.
        self._products: WeakKeyDictionary[KVMap, RecentProducts] = WeakKeyDictionary()
        self.key_norm_LH = _stacked_key_norm(weights)
        self.key_norm_eps = weights[0].key_norm_eps
        rotates = [[[w.rotates]] for w in weights]
        is_plain = all(w.rotates for w in weights)
        self.rotates_L11 = None if is_plain else upload(rotates, stack.device, torch.bool)

    def project(
        self, x_ND: Tensor, first_layer: int, rotary: Rotary, kv_map: KVMap = UNMAPPED
    ) -> tuple[Tensor, Tensor]:
        """Keys and values for the layers from ``first_layer`` (index) on.

        Args:
            x_ND: Hidden states at the exit.
            first_layer: Index of the first layer not executed.
            rotary: Cosines and sines of the rows' positions, each [N, 1, rotated part of H]; empty
                for a family without rotary embeddings.
            kv_map: What it is to pass.

        Returns:
            Keys (rotated) and values, each [N, L, G, H].
        """
        out = self._linear(first_layer, kv_map)(self._unit(x_ND))
        keys, values = out.view(len(x_ND), -1, 2, self.heads, self.head_dim).unbind(2)
        if self.key_norm_LH is not None:
            keys = _rms(keys, self.key_norm_eps) * self.key_norm_LH[first_layer:, None]
        return self._rotated(keys, first_layer, rotary), values

    def _linear(self, first_layer: int, kv_map: KVMap) -> Product:
        """The product with the weights from a layer on; packed for each exit that occurs."""
        exit_map = kv_map.by_exit.get(first_layer)
        owner = UNMAPPED if exit_map is None else kv_map
        kept = self._products.setdefault(owner, RecentProducts())
        return kept.get(first_layer, lambda: _product(*self._stacked(first_layer, exit_map)))

    def _stacked(self, first_layer: int, exit_map: ExitMap | None) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of the layers from one on, a map folded in."""
        if exit_map is None:
            start = first_layer * self.rows
            return self.weight_RD[start:], None if self.bias_R is None else self.bias_R[start:]
        device, dtype = self._stack.device, self._stack.dtype
        A_rD, B_LDr, b_LD = (part.to(device) for part in exit_map)
        weights, biases = [], []
        for index, (B_Dr, b_D) in enumerate(zip(B_LDr, b_LD, strict=True), first_layer):
            layer = self._stack.kv_weights(index)
            folded_RD = _folded(layer)
            weights.append(folded_RD + (folded_RD @ B_Dr) @ A_rD)
            biases.append(_folded_bias(layer) + folded_RD @ b_D)
        bias_R = torch.cat(biases)
        return torch.cat(weights).to(dtype), bias_R.to(dtype) if bias_R.any() else None

    def _unit(self, x_ND: Tensor) -> Tensor:
        """The norm that all layers share, without weight and bias; in float32 inside."""
        if self.centres:
            x32 = x_ND.float()
            return nn.functional.layer_norm(x32, x32.shape[-1:], eps=self.eps).to(x_ND.dtype)
        return _rms(x_ND, self.eps)

    def _rotated(self, keys_NLGH: Tensor, first_layer: int, rotary: Rotary) -> Tensor:
        if not rotary:
            return keys_NLGH
        rotated_NLGH = _rotate(keys_NLGH, rotary)
        if self.rotates_L11 is None:
            return rotated_NLGH
        return torch.where(self.rotates_L11[first_layer:], rotated_NLGH, keys_NLGH)


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
        stack: The model, as a stack of layers.
        kv: Cache that is written to.
        projector: Projects exit states; None leaves the cache's invariant broken, as the tests'
            negative control needs it.
    """

    def __init__(self, stack: LayerStack, kv: SlotKV, projector: KVProjector | None) -> None:
        self._stack = stack
        self._kv = kv
        self._projector = projector

    def fill(self, tokens: Sequence[ExitedToken]) -> None:
        """Fill all layers that the tokens skipped, in one product for each depth and map."""
        if self._projector is None:
            return
        together: dict[tuple[int, int], list[ExitedToken]] = {}
        for token in tokens:
            together.setdefault((token.depth, id(token.kv_map)), []).append(token)
        for (depth, _), group in together.items():
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
        """Fill the layers from ``depth`` on for tokens that left there, in one product.

        Args:
            depth: Layers that they executed.
            x_ND: Their states there.
            slots, positions: Where each stands in the cache, N of each.
            kv_map: What they are filled through.
        """
        if self._projector is None:
            return
        places = np.array((positions, slots), np.int64)
        positions_N, slots_N = upload(places, self._stack.device).unbind()
        rotary = self._stack.rotary(x_ND[:, None], positions_N[:, None])
        keys, values = self._projector.project(x_ND, depth, rotary, kv_map)
        self._kv.fill(depth, slots_N, positions_N, keys, values)


def _require_one_norm(weights: list[KVWeights]) -> None:
    kinds = {(w.norm, w.eps) for w in weights}
    key_kinds = {("no norm" if w.key_norm_H is None else "rms", w.key_norm_eps) for w in weights}
    for what, found in (("input", kinds), ("key", key_kinds)):
        if len(found) > 1:
            names = " and ".join(f"{name} ({eps:g})" for name, eps in sorted(found))
            raise ModelError(
                "model",
                f"has {what} norms whose kind or epsilon differs between layers: {names}",
                "Use a model whose layers share one kind of norm and one epsilon",
            )


def _product(weight_RD: Tensor, bias_R: Tensor | None) -> Product:
    if can_pack(weight_RD):
        return PackedWeight(weight_RD, bias_O=bias_R)
    return lambda x_ND: nn.functional.linear(x_ND, weight_RD, bias_R)


def _folded(weights: KVWeights) -> Tensor:
    return weights.weight_RD.float() * weights.scale_D.float()


def _stacked_bias(weights: list[KVWeights], dtype: torch.dtype) -> Tensor | None:
    if all(w.bias_R is None and w.shift_D is None for w in weights):
        return None
    return torch.cat([_folded_bias(w) for w in weights]).to(dtype)


def _folded_bias(weights: KVWeights) -> Tensor:
    bias_R = weights.weight_RD.new_zeros(len(weights.weight_RD), dtype=torch.float32)
    if weights.bias_R is not None:
        bias_R = bias_R + weights.bias_R.float()
    if weights.shift_D is not None:
        bias_R = bias_R + weights.weight_RD.float() @ weights.shift_D.float()
    return bias_R


def _stacked_key_norm(weights: list[KVWeights]) -> Tensor | None:
    norms = [w.key_norm_H for w in weights if w.key_norm_H is not None]
    return torch.stack(norms) if norms else None


def _rms(x: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotate(keys_NLGH: Tensor, rotary: Rotary) -> Tensor:
    """Keys turned by position, in the leading part of each head that cosines are given for."""
    cos, sin = (part[:, :, None] for part in rotary)
    turned, kept = keys_NLGH.tensor_split([cos.shape[-1]], dim=-1)
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned
