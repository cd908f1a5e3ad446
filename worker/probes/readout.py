"""A model's final norm and LM head, as cheap as probes need them.

At batch 1 the price of a probe is not arithmetic but dispatch: a torch operation costs 3 to 10 µs,
a numpy one about 1 µs (measured; see docs/probes.md). So on a CPU they run in compiled code and in
numpy. On another device the candidate and state probes run there, and all else here, after one
transfer.

Shape suffixes: N rows, K candidates, D width, V vocabulary; 2 weight and bias.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import FloatArray, IntArray
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.transfers import fetch, upload
from offramp.worker.probes.candidates.kernel import Bits, Rows

S = TypeVar("S")
T = TypeVar("T")

DERIVED = 8
"""Results kept by ``Readout.derived``."""

SMALL = 2.0**-8
"""Scale of the input that reveals a norm's epsilon: its square is near the usual epsilons."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far a recovered norm may be from the model's, relative to the largest output."""


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A final norm in plain numbers: ``(x − mean?) / rms · weight + bias``.

    It is recovered from what the model's norm answers, not from its class: RMS norms with weight w
    or 1 + w and layer norms with or without bias are all of this form.

    Attributes:
        weight_D: Scale per column, float32.
        bias_D: Shift per column; None if it is zero.
        eps: Added to the mean square.
        is_centred: Whether the mean is subtracted first (a layer norm).
    """

    weight_D: FloatArray
    bias_D: FloatArray | None
    eps: float
    is_centred: bool

    @classmethod
    def of(cls, stack: LayerStack) -> FinalNorm | None:
        """The stack's norm; None if it is of another form."""
        if stack.width % 2:
            return None  # the question below needs as many +1 as −1
        sign_D = torch.ones(stack.width, dtype=stack.dtype, device=stack.device)
        sign_D[1::2] = -1
        ask_ND = torch.stack([sign_D, SMALL * sign_D, sign_D.abs(), 0 * sign_D])
        unit_D, small_D, ones_D, zero_D = _host(stack.norm(ask_ND)).astype(np.float64)
        unit = np.abs(unit_D - zero_D).sum()
        if not unit > 0:
            return None
        scale = np.abs(small_D - zero_D).sum() / unit
        if not scale > 2 * SMALL:
            return None  # the output grows with the input: it is not divided by its rms
        eps = max(0.0, SMALL**2 * (1 - scale**2) / (scale**2 - SMALL**2))
        weight_D = (unit_D - zero_D) * _host(sign_D) * math.sqrt(1 + eps)
        bias_D = zero_D.astype(np.float32) if np.any(zero_D) else None
        is_centred = bool(np.abs(ones_D - zero_D).max() < 0.5 * np.abs(weight_D).max())
        norm = cls(weight_D.astype(np.float32), bias_D, float(eps), is_centred)
        return norm if norm._agrees(stack) else None

    @property
    def both_2D(self) -> FloatArray:
        """Weight and bias of the norm, [2, D]."""
        bias_D = np.zeros_like(self.weight_D) if self.bias_D is None else self.bias_D
        return np.stack((self.weight_D, bias_D))

    def rows(self, x_ND: FloatArray) -> FloatArray:
        """The norm of some rows, [N, D] float32."""
        if self.is_centred:
            x_ND = x_ND - x_ND.mean(-1, keepdims=True)
        mean_N = np.einsum("nd,nd->n", x_ND, x_ND) / x_ND.shape[1]
        out_ND = x_ND * self.weight_D
        out_ND /= np.sqrt(mean_N + self.eps)[:, None]
        return out_ND if self.bias_D is None else out_ND + self.bias_D

    def _agrees(self, stack: LayerStack) -> bool:
        """Whether random rows of several scales come out as the model's norm has them."""
        random = np.random.default_rng(0).standard_normal((3, stack.width)) + 0.5
        x_ND = torch.tensor(random * [[0.1], [1.0], [30.0]]).to(stack.device, stack.dtype)
        expected_ND = _host(stack.norm(x_ND))
        error = float(np.abs(self.rows(_host(x_ND)) - expected_ND).max())
        return error <= TOLERANCE.get(stack.dtype, 1e-2) * float(np.abs(expected_ND).max())


class Readout:
    """Final norm and head of one model; one per engine, shared by its probes.

    Args:
        stack: The model, as a stack of layers.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self.norm = FinalNorm.of(stack)
        self.is_host = stack.device.type == "cpu"
        self.norm_2D = None if self.norm is None else self.norm.both_2D
        self.head_VD = _head_view(stack) if self.is_host else None
        self._derived: dict[tuple[object, int], tuple[object, Any]] = {}
        self._deriving = threading.Lock()  # held to change the dictionary, not to compute

    def host(self, x_ND: Tensor) -> FloatArray:
        """Hidden states as float32 in host memory; may share memory with ``x_ND``."""
        return x_ND.numpy() if self.is_host and x_ND.dtype is torch.float32 else _host(x_ND)

    def normed(self, x_ND: FloatArray) -> FloatArray:
        """The final norm of rows in host memory, [N, D] float32."""
        if self.norm is not None:
            return self.norm.rows(x_ND)
        return _host(self.stack.norm(torch.tensor(x_ND).to(self.stack.device, self.stack.dtype)))

    def head_rows(self, tokens_NK: IntArray) -> FloatArray:
        """Rows of the head in host memory, [N, K, D] float32."""
        return _host(self.stack.head_rows(upload(tokens_NK, self.stack.device)))

    def derived(self, make: Callable[[Readout, S], T], source: S) -> T:
        """``make(self, source)``, computed once per source and kept for the latest few.

        Another thread than the engine's may ask too, to have it ready.

        Args:
            make: What computes it.
            source: A candidate table or a policy, told apart by its identity.
        """
        key = (make, id(source))
        known = self._derived.get(key)
        if known is None:
            # The source is kept too, so that its id stays its own.
            known = (source, make(self, source))
            with self._deriving:
                while len(self._derived) >= DERIVED:
                    del self._derived[next(iter(self._derived))]
                known = self._derived.setdefault(key, known)
        value: T = known[1]
        return value


def _host(x: Tensor) -> FloatArray:
    array: FloatArray = fetch(x.detach().float())[0].numpy()
    return array


def raw(x: Tensor) -> Rows:
    """Show a tensor's memory to numpy: float32 as it is, bfloat16 as bits; else a float32 copy."""
    if x.dtype is torch.float32:
        array: FloatArray = x.numpy()
        return array
    if x.dtype is torch.bfloat16:
        bits: Bits = x.view(torch.int16).numpy().view(np.uint16)
        return bits
    return _host(x)


def _head_view(stack: LayerStack) -> Rows | None:
    """The head's matrix [V, D] without a copy; None if the model does not show it."""
    weight = getattr(stack, "head_weight_VD", None)
    if weight is None or not weight.is_contiguous():
        return None
    return raw(weight.detach())
