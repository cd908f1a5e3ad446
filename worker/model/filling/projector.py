"""Keys and values of skipped layers from an exit state, by a product for all remaining layers.

Shape suffixes: N rows, L layers filled, D width, G key/value heads, H head_dim, K = G·H,
R = L·2·G·H stacked output rows, I inputs, r rank.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.worker.model.filling.exit_fill import ExitFill, product_of, with_values_alike
from offramp.worker.model.filling.folding import (
    folded,
    folded_bias,
    require_one_norm,
    stacked_bias,
    stacked_key_norm,
)
from offramp.worker.model.filling.kv_map import UNMAPPED, ExitMap, KVMap
from offramp.worker.model.kernels.compiled_layer import norm_of
from offramp.worker.model.kernels.fill_rows import FillTarget, keep_rows, require_places
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.products import Product, RecentProducts
from offramp.worker.model.stack import LayerStack, Rotary
from offramp.worker.model.transfers import upload


class Places(NamedTuple):
    """Slots and positions of tokens, on the host and on the device, and cosines and sines there."""

    here_2N: NDArray[np.int64]
    there_2N: Tensor
    rotary: Rotary


class KVProjector:
    """The ``project`` mode of the cache: what each skipped layer would have stored, had the
    hidden state reached it unchanged (Schuster et al. 2022, CALM, section 3.2, state propagation),
    or as a map changes it.

    Every layer's input norm shares one root mean square (or one mean and variance), so its weight
    is folded into the stacked key and value matrices, and its bias into theirs; so is a map, which
    is why it starts behind that shared part of the norm. If a map reads the token before, too, the
    first layer's entries are made first: it reads of the token before's what it needs.

    Raises:
        ModelError: the layers' norms differ in kind or epsilon, so no single one serves all.
    """

    def __init__(self, stack: LayerStack) -> None:
        weights = [stack.kv_weights(index) for index in range(stack.layers)]
        require_one_norm(weights)
        self.heads = stack.kv_heads
        self.head_dim = stack.head_dim
        self.centres = weights[0].norm == "layer"
        self.eps = weights[0].eps
        self.rows = 2 * stack.kv_heads * stack.head_dim
        self.weight_RD = torch.cat([folded(each) for each in weights]).to(stack.dtype)
        self.bias_R = stacked_bias(weights, stack.dtype)
        self._stack = stack
        self._rms: Product = partial(_rms, eps=self.eps)
        self._unit_D: Tensor | None = None
        if stack.device.type == "cpu" and not self.centres:
            self._unit_D = torch.ones(stack.width, dtype=stack.dtype)
            self._rms = norm_of(self._unit_D, self.eps)
        # Of a map that no request is filled through any more they go with it.
        self._fills: WeakKeyDictionary[KVMap, RecentProducts[ExitFill]] = WeakKeyDictionary()
        zero_11 = torch.zeros((1, 1), dtype=torch.long, device=stack.device)
        self._has_angles = len(stack.angle_tables) == len(stack.rotary(self.weight_RD, zero_11))
        self.key_norm_LH = stacked_key_norm(weights)
        self.key_norm_eps = weights[0].key_norm_eps
        rotates = [[[w.rotates]] for w in weights]
        is_plain = all(w.rotates for w in weights)
        self.rotates_L11 = None if is_plain else upload(rotates, stack.device, torch.bool)

    def project(
        self,
        x_ND: Tensor,
        first_layer: int,
        rotary: Rotary,
        kv_map: KVMap = UNMAPPED,
        before_NK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values for the layers from ``first_layer`` (index) on.

        Args:
            x_ND: Hidden states at the exit.
            first_layer: Index of the first layer not executed.
            rotary: Cosines and sines of the rows' positions, each [N, 1, rotated part of H]; empty
                for a family without rotary embeddings.
            kv_map: What it is to pass.
            before_NK: Values that the first of these layers keeps of each row's token before, for
                a map that reads them; None: there is no such token.

        Returns:
            Keys (rotated) and values, each [N, L, G, H].
        """
        u_ND = self._unit(x_ND)
        fill = self._behind(first_layer, kv_map)
        if fill.one is None:
            made_NR = fill.rest(u_ND)
        else:
            if before_NK is None:
                before_NK = u_ND.new_zeros(len(u_ND), self.rows // 2)
            rest_NR = fill.rest(torch.cat((u_ND, before_NK * fill.share), 1))
            made_NR = torch.cat((fill.one(u_ND), rest_NR), 1)
        return self._entries(self._by_layer(made_NR), first_layer, rotary)

    def values_before(self, x_TD: Tensor, layer: int) -> Tensor:
        """Values [T, K] that a layer (index) keeps of the tokens before those of a whole document.

        Args:
            x_TD: States that reach it, in the order of the document; zeros stand before the first.
            layer: Index of the layer.
        """
        weight_RD, bias_R = self._of_layer(layer)
        # Not by a product that is chosen by measuring: what is fitted to it is to be repeatable.
        values_TK = nn.functional.linear(self._unit(x_TD), weight_RD, bias_R)[:, self.rows // 2 :]
        return torch.cat((torch.zeros_like(values_TK[:1]), values_TK[:-1]))

    def fill(
        self,
        x_ND: Tensor,
        first_layer: int,
        places_2N: NDArray[np.int64],
        kv: SlotKV,
        kv_map: KVMap = UNMAPPED,
    ) -> None:
        """Write what ``project`` gives to a cache, by compiled code on a CPU.

        Args:
            x_ND: Hidden states at the exit.
            first_layer: Index of the first layer not executed.
            places_2N: Each token's slot and position.
            kv: Cache that is written to.
            kv_map: What they are to pass.

        Raises:
            ValueError: states of another dtype than the cache's, or places outside it.
        """
        fill = self._behind(first_layer, kv_map)
        places_2N = np.ascontiguousarray(places_2N, np.int64)
        if 0 < len(x_ND) <= fill.few_rows and self._has_angles:
            if self._unit_D is None:
                x_ND = self._unit(x_ND)
            target = partial(self._target, first_layer, kv)
            fill.job(kv, (self._unit_D, self.eps), target).run(x_ND, places_2N)
            return
        places = self._places(x_ND, places_2N, kv)
        u_ND = self._unit(x_ND)
        if fill.one is not None:
            self._keep(fill.one(u_ND), first_layer, places, kv)
            before_NK = kv.values_before(first_layer, *places.there_2N)
            u_ND = torch.cat((u_ND, before_NK * fill.share), 1)
        self._keep(fill.rest(u_ND), first_layer + (fill.one is not None), places, kv)

    def fill_one(
        self,
        x_ND: Tensor,
        layer: int,
        places_2N: NDArray[np.int64],
        kv: SlotKV,
        kv_map: KVMap = UNMAPPED,
    ) -> None:
        """Write what one layer (index) keeps of states that reach it, if a map reads it there."""
        one = self._behind(layer, kv_map).one
        if one is None:
            return
        places = self._places(x_ND, np.ascontiguousarray(places_2N, np.int64), kv)
        self._keep(one(self._unit(x_ND)), layer, places, kv)

    def _places(self, x_ND: Tensor, places_2N: NDArray[np.int64], kv: SlotKV) -> Places:
        """Where states' entries go; a ValueError if the cache cannot hold them there."""
        require_places(x_ND, places_2N, kv, self._stack.context)
        there_2N = upload(places_2N, self._stack.device)
        rotary = self._stack.rotary(x_ND[:, None], there_2N[1, :, None])
        return Places(places_2N, there_2N, rotary)

    def _keep(self, made_NR: Tensor, first_layer: int, places: Places, kv: SlotKV) -> None:
        """Norm and rotate keys, and write them and the values to a cache."""
        if self._stack.device.type == "cpu":
            angles = tuple(part[:, 0].contiguous() for part in places.rotary)
            keep_rows(made_NR, places.here_2N, self._target(first_layer, kv, angles))
            return
        slots_N, positions_N = places.there_2N
        entries = self._entries(self._by_layer(made_NR), first_layer, places.rotary)
        kv.fill(first_layer, slots_N, positions_N, *entries)

    def _target(
        self, first_layer: int, kv: SlotKV, angles: tuple[Tensor, ...] | None = None
    ) -> FillTarget:
        """Where compiled code writes rows, and how it turns their keys; None: by tables."""
        by_position = angles is None
        norms_LH = None if self.key_norm_LH is None else self.key_norm_LH[first_layer:]
        rotates_L = None if self.rotates_L11 is None else self.rotates_L11[first_layer:]
        return FillTarget(
            kv,
            first_layer,
            self._stack.angle_tables if angles is None else angles,
            by_position,
            norms_LH,
            self.key_norm_eps,
            rotates_L,
        )

    def _entries(
        self, made_NL2GH: Tensor, first_layer: int, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """Keys, normed and rotated, and values."""
        keys, values = made_NL2GH.unbind(2)
        layers = slice(first_layer, first_layer + keys.shape[1])
        if self.key_norm_LH is not None:
            keys = _rms(keys, self.key_norm_eps) * self.key_norm_LH[layers, None]
        return self._rotated(keys, layers, rotary), values

    def _by_layer(self, made_NR: Tensor) -> Tensor:
        return made_NR.view(len(made_NR), -1, 2, self.heads, self.head_dim)

    def _behind(self, first_layer: int, kv_map: KVMap) -> ExitFill:
        """What fills the layers from one on; packed for each exit that occurs."""
        exit_map = kv_map.at(first_layer)
        owner = UNMAPPED if exit_map is None else kv_map
        kept = self._fills.get(owner)
        if kept is None:
            kept = self._fills[owner] = RecentProducts()
        return kept.get(first_layer, lambda: self._made_for(first_layer, exit_map))

    def _made_for(self, first_layer: int, exit_map: ExitMap | None) -> ExitFill:
        weight_RI, bias_R = self._stacked(first_layer, exit_map)
        if exit_map is None or not exit_map.reads_before:
            return ExitFill(None, product_of(weight_RI, bias_R, rounds=exit_map is not None))
        one = product_of(*self._of_layer(first_layer), rounds=False)
        weight_RI, share = with_values_alike(weight_RI, self._stack.width)
        return ExitFill(one, product_of(weight_RI, bias_R, rounds=True), share)

    def _of_layer(self, index: int) -> tuple[Tensor, Tensor | None]:
        """What makes keys and values of one layer alone."""
        rows = slice(index * self.rows, (index + 1) * self.rows)
        return self.weight_RD[rows], None if self.bias_R is None else self.bias_R[rows]

    def _stacked(self, first_layer: int, exit_map: ExitMap | None) -> tuple[Tensor, Tensor | None]:
        """Weights [R, I] and biases of the layers from one on, a map folded in."""
        if exit_map is None:
            start = first_layer * self.rows
            return self.weight_RD[start:], None if self.bias_R is None else self.bias_R[start:]
        device, dtype = self._stack.device, self._stack.dtype
        A_rI, B_LDr, b_LD = (part.to(device) for part in exit_map)
        weights, biases = [], []
        for index, (B_Dr, b_D) in enumerate(zip(B_LDr, b_LD, strict=True), first_layer):
            if exit_map.reads_before and index == first_layer:
                continue  # it reads the exit's state itself
            layer = self._stack.kv_weights(index)
            folded_RD = folded(layer)
            weight_RI = (folded_RD @ B_Dr) @ A_rI
            weight_RI[:, : self._stack.width] += folded_RD
            weights.append(weight_RI)
            biases.append(folded_bias(layer) + folded_RD @ b_D)
        bias_R = torch.cat(biases)
        return torch.cat(weights).to(dtype), bias_R.to(dtype) if bias_R.any() else None

    def _unit(self, x_ND: Tensor) -> Tensor:
        """The norm that all layers share, without weight and bias; in float32 inside."""
        if self.centres:
            x32 = x_ND.float()
            return nn.functional.layer_norm(x32, x32.shape[-1:], eps=self.eps).to(x_ND.dtype)
        return self._rms(x_ND)

    def _rotated(self, keys_NLGH: Tensor, layers: slice, rotary: Rotary) -> Tensor:
        if not rotary:
            return keys_NLGH
        rotated_NLGH = _rotate(keys_NLGH, rotary)
        if self.rotates_L11 is None:
            return rotated_NLGH
        return torch.where(self.rotates_L11[layers], rotated_NLGH, keys_NLGH)


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
