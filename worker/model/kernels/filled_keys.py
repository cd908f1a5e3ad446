"""Keys and values that a fill has made, turned and put into the cache by compiled code.

A few tokens take torch a dozen calls for it, which cost several times what the product did.

Shape suffixes: N tokens, L layers filled, G key heads, H head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import pointer, read, write
from offramp.worker.model.kernels.layer import normed, rotate
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import Rotary

(
    TOKENS, LAYERS, HEADS, WIDTH, IS_BITS, MADE, NORM, COS, SIN, TURNED, ROTATES, PLACES, KEYS,
    VALUES, LAYER_BYTES, CAPACITY,
) = range(16)  # fmt: skip
"""What a job says: sizes and addresses."""


def keep_filled(
    made_NL2GH: Tensor,
    rotary: Rotary,
    norms_LH: Tensor | None,
    eps: float,
    rotates_L: Tensor | None,
    places_2N: NDArray[np.int64],
    first_layer: int,
    kv: SlotKV,
) -> None:
    """Norm and rotate keys as the layers do, and write them and the values to the cache.

    Args:
        made_NL2GH: Keys and values that the layers' products gave, in the cache's dtype.
        rotary: The tokens' cosines and sines, each [N, 1, turned part of H], or ().
        norms_LH: Weights of the layers' key norms; None: they have none.
        eps: Epsilon of these.
        rotates_L: Which layers rotate their keys; None: all.
        places_2N: The tokens' slots and positions.
        first_layer: Index of the first layer filled.
        kv: Cache on the CPU.
    """
    tokens, layers, _, heads, width = made_NL2GH.shape
    layer_bytes = kv.keys_LSGCH.stride(0) * kv.keys_LSGCH.element_size()
    parts = (kv.keys_LSGCH, kv.values_LSGCH)
    keys, values = (part.data_ptr() + first_layer * layer_bytes for part in parts)
    cos, sin = (part.contiguous() for part in rotary) if rotary else (None, None)
    job_J = np.array(
        [
            tokens, layers, heads, width, made_NL2GH.dtype is torch.bfloat16,
            made_NL2GH.data_ptr(), _address(norms_LH), _address(cos), _address(sin),
            0 if cos is None else cos.shape[-1], _address(rotates_L), places_2N.ctypes.data,
            keys, values, layer_bytes, kv.capacity,
        ],
        np.int64,
    )  # fmt: skip
    _keep(job_J.ctypes.data, np.float32(eps))


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


@compiled
def _keep(job: int, eps: float) -> None:
    """Do a job.

    Args:
        job: Address of what is done, int64: the number of tokens N and of layers L, key heads G,
            head_dim H, whether numbers are bits of bfloat16; addresses of what the product made
            [N, L, 2, G, H], of the layers' key norms [L, H] (0: they have none), of the tokens'
            cosines and sines [N, turned part of H]; that part; addresses of what says of each layer
            whether it rotates, of bytes (0: all do), of the tokens' slots and positions [2, N], and
            of the first filled layer's keys and values [slots, G, capacity, H]; bytes from one
            layer's to the next one's, and positions of a slot.
        eps: Epsilon of the key norms.
    """
    job_J = carray(pointer(job), CAPACITY + 1, np.int64)
    is_bits, heads, width, turned = job_J[IS_BITS] != 0, job_J[HEADS], job_J[WIDTH], job_J[TURNED]
    tokens, layers, capacity = job_J[TOKENS], job_J[LAYERS], job_J[CAPACITY]
    size = 2 if is_bits else 4
    places_2N = carray(pointer(job_J[PLACES]), (2, tokens), np.int64)
    key_1H, value_H = np.empty((1, width), np.float32), np.empty(width, np.float32)
    cos_H, sin_H = np.empty(turned, np.float32), np.empty(turned, np.float32)
    scratch_H = np.empty(turned, np.float32)
    for n in range(tokens):
        if turned != 0:
            read(job_J[COS] + n * turned * size, is_bits, cos_H)
            read(job_J[SIN] + n * turned * size, is_bits, sin_H)
        for layer in range(layers):
            rotates = turned != 0
            if rotates and job_J[ROTATES] != 0:
                rotates = carray(pointer(job_J[ROTATES]), layers, np.uint8)[layer] != 0
            for g in range(heads):
                made = ((n * layers + layer) * 2 * heads + g) * width * size + job_J[MADE]
                read(made, is_bits, key_1H[0])
                read(made + heads * width * size, is_bits, value_H)
                if job_J[NORM] != 0:
                    normed(key_1H, job_J[NORM] + layer * width * size, eps, is_bits, key_1H)
                if rotates:
                    rotate(key_1H[0, :turned], cos_H, sin_H, is_bits, scratch_H)
                row = (places_2N[0, n] * heads + g) * capacity + places_2N[1, n]
                at = layer * job_J[LAYER_BYTES] + row * width * size
                write(key_1H[0], is_bits, job_J[KEYS] + at)
                write(value_H, is_bits, job_J[VALUES] + at)
