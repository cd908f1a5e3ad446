"""Decoder layers of known form, described once and run by compiled code for few tokens.

Shape suffixes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.worker.model.attention import Window
from offramp.worker.model.kernels.layer import GATE, OUT, QUERIES, RUN_LAYERS, VALUES, norm_rows
from offramp.worker.model.kernels.matrix import GROUP, INPUTS, KIND, OUTPUTS, KernelMatrix
from offramp.worker.model.kernels.multiply import BITS, FLOATS, TILES, code_for
from offramp.worker.model.kernels.team import team_of
from offramp.worker.model.kernels.tiles import SIDE, fits_tiles, has_tiles
from offramp.worker.model.kernels.weigh_values import value_code_for
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import Rotary

COARSE_LANES = {"AVX512": 16, "AVX2": 8}
"""Weights of bfloat16 whose exponential PyTorch's attention takes coarsely, in vectors of so many.

What does not fill a vector, and all of it on other machines, is exact."""


class LayerForm:
    """What compiled code must know of a layer.

    Args:
        layer: A decoder layer in the form of Hugging Face's Llama; only read.
        matrices: Its matrices in the order of ``QUERIES`` and its neighbours.

    Attributes:
        name: What its speed depends on, in words.
        described, matrices, reals: See ``run_layers``.
    """

    def __init__(self, layer: Any, matrices: Sequence[KernelMatrix]) -> None:
        attention = layer.self_attn
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self._kept = (norms, matrices)  # addresses do not keep alive
        sizes = [matrix.described[[KIND, GROUP, OUTPUTS, INPUTS]].tolist() for matrix in matrices]
        self.name = f"{norms[0].weight.dtype}, heads of {attention.head_dim}, matrices {sizes}"
        self.matrices = np.stack([matrix.described for matrix in matrices])
        epsilons = [0.0 if norm is None else norm.variance_epsilon for norm in norms]
        self.reals = np.array([*epsilons, attention.scaling], np.float32)
        is_bits = norms[0].weight.dtype is torch.bfloat16
        key_heads = attention.config.num_key_value_heads
        tiled = is_bits and has_tiles() and fits_tiles(SIDE, attention.head_dim)
        self.described = np.array(
            [
                is_bits,
                COARSE_LANES.get(torch.backends.cpu.get_cpu_capability(), 0) if is_bits else 0,
                attention.num_key_value_groups * key_heads,
                key_heads,
                attention.head_dim,
                getattr(attention, "use_rope", True),
                code_for(BITS if is_bits else FLOATS),
                code_for(TILES) if tiled else 0,
                value_code_for(int(is_bits)),
                *(0 if norm is None else norm.weight.data_ptr() for norm in norms),
            ],
            np.int64,
        )


class CompiledLayers:
    """Runs neighbouring layers of a stack for few tokens as one call, on torch's threads.

    Args:
        forms: All layers of the stack.
    """

    def __init__(self, forms: Sequence[LayerForm]) -> None:
        self._forms = tuple(forms)  # addresses do not keep alive
        described = np.stack([form.described for form in forms])
        matrices = np.stack([form.matrices for form in forms])
        reals = np.stack([form.reals for form in forms])
        self._described = (described, matrices, reals)
        self._addresses = [part.ctypes.data for part in self._described]
        outputs = matrices[:, :, OUTPUTS]
        heads = outputs[:, : VALUES + 1].sum(1).max()
        # What the threads make together of a token: heads, context, what is added, inner states.
        widths = [int(heads), *(int(outputs[:, n].max()) for n in (QUERIES, OUT, GATE))]
        *offsets, self._shared_width = accumulate(widths, initial=0)
        self._offsets = [4 * offset for offset in offsets]

    def run(
        self, first: int, last: int, x_BTD: Tensor, window: Window, kv: SlotKV, rotary: Rotary
    ) -> Tensor:
        """What the layers from ``first`` on, without ``last``, compute, [B, T, D].

        Their new keys and values are in the cache then.
        """
        x_BTD = x_BTD.contiguous()
        out_BTD = torch.empty_like(x_BTD)
        cos_BTH, sin_BTH = rotary[0].contiguous(), rotary[1].contiguous()
        cells_M3 = window.cells_M3
        tokens = len(cells_M3)
        shared = np.empty(tokens * self._shared_width, np.float32)
        shared_at = shared.ctypes.data
        job_J = np.array(
            [
                tokens, first, last, len(self._forms), x_BTD.data_ptr(), out_BTD.data_ptr(),
                cos_BTH.data_ptr(), sin_BTH.data_ptr(), cells_M3.ctypes.data, *kv.addresses(),
                kv.capacity, *self._addresses,
                *(shared_at + tokens * offset for offset in self._offsets),
            ],
            np.int64,
        )  # fmt: skip
        team_of(torch.get_num_threads()).run(RUN_LAYERS, job_J)
        return out_BTD


def norm_of(weight_D: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """The RMS norm over the last dimension, as the layers compute theirs.

    Args:
        weight_D: The norm's weight on the CPU, bfloat16 or float32; rows have the same dtype.
        eps: What keeps it from dividing by zero.
    """
    width, is_bits = len(weight_D), weight_D.dtype is torch.bfloat16

    def norm(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rows = x.numel() // width
        norm_rows(x.data_ptr(), weight_D.data_ptr(), eps, is_bits, rows, width, out.data_ptr())
        return out

    return norm
