"""A model's final norm and LM head, as cheap as probes need them.

At batch 1 the price of a probe is not arithmetic but dispatch: a torch operation costs 3 to 10 µs,
a numpy one about 1 µs (measured; see docs/probes.md). So on a CPU the norm and the scores run in
numpy. On another device the scores run there, and all else here, after one transfer.

Shape suffixes: N rows, K candidates, D width, V vocabulary.
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
from offramp.worker.stack import LayerStack

T = TypeVar("T")

DERIVED = 8
"""Results kept by ``Readout.derived``."""

FOLDED = 16 * 1024 * 1024
"""Entries (64 MiB) up to which the head is kept a second time, folded."""

SHELVED, SHELVED_BYTES = 8, 4 * 1024 * 1024
"""Arrays kept by a shelf, and the largest that it keeps."""

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

    def rows(self, x_ND: FloatArray) -> FloatArray:
        """The norm of some rows, [N, D] float32."""
        if self.is_centred:
            x_ND = x_ND - x_ND.mean(-1, keepdims=True)
        mean_N = np.einsum("nd,nd->n", x_ND, x_ND) / x_ND.shape[1]
        out_ND = x_ND * self.weight_D
        out_ND /= np.sqrt(mean_N + self.eps)[:, None]
        return out_ND if self.bias_D is None else out_ND + self.bias_D

    def fold(self, rows: FloatArray, out: FloatArray) -> FloatArray | None:
        """Rows of the head that score raw states; the scores come out multiplied by the rms.

        Args:
            rows: Rows of the head, [..., D].
            out: Where the folded rows go, [..., D].

        Returns:
            What to add to the scores once divided by the rms, [...]; None for nothing.
        """
        np.multiply(rows, self.weight_D, out)
        if self.is_centred:
            # Σ w·(x − mean x)·row = Σ x·(w·row − mean w·row).
            out -= out.mean(-1, keepdims=True)
        return None if self.bias_D is None else rows @ self.bias_D

    def rms(self, x_D: FloatArray, square: float) -> float:
        """What the scores of folded rows are divided by, for a state of known squared length."""
        mean_square = square / x_D.size
        if self.is_centred:
            mean_square -= float(x_D.mean()) ** 2
        return math.sqrt(mean_square + self.eps)

    def rms_rows(self, x_ND: FloatArray, square_N: FloatArray) -> FloatArray:
        """The same of N rows."""
        mean_square_N = square_N / x_ND.shape[1]
        if self.is_centred:
            mean_square_N -= x_ND.mean(-1) ** 2
        rms_N: FloatArray = np.sqrt(mean_square_N + np.float32(self.eps))
        return rms_N

    def _agrees(self, stack: LayerStack) -> bool:
        """Whether random rows of several scales come out as the model's norm has them."""
        random = np.random.default_rng(0).standard_normal((3, stack.width)) + 0.5
        x_ND = torch.tensor(random * [[0.1], [1.0], [30.0]]).to(stack.device, stack.dtype)
        expected_ND = _host(stack.norm(x_ND))
        error = float(np.abs(self.rows(_host(x_ND)) - expected_ND).max())
        return error <= TOLERANCE.get(stack.dtype, 1e-2) * float(np.abs(expected_ND).max())


class Shelf:
    """Arrays for reuse: fresh memory of this size costs a page fault per 4 KiB.

    Threads may share it: each call takes or adds at most one array, in one step.
    """

    def __init__(self) -> None:
        self._arrays: list[FloatArray] = []

    def take(self, shape: tuple[int, ...]) -> FloatArray:
        """An array of that shape, of undefined content."""
        try:
            array = self._arrays.pop()
        except IndexError:
            return np.empty(shape, np.float32)
        if array.shape == shape:
            return array
        self._arrays.append(array)
        return np.empty(shape, np.float32)

    def put(self, array: FloatArray) -> None:
        """Give an array back that nobody uses any more; only a few are kept."""
        if len(self._arrays) >= SHELVED:
            self._arrays.clear()
        if array.nbytes <= SHELVED_BYTES:
            self._arrays.append(array)


class Readout:
    """Final norm and head of one model; one per engine, shared by its probes.

    Args:
        stack: The model.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self.norm = FinalNorm.of(stack)
        self.is_host = stack.device.type == "cpu"
        self.shelf = Shelf()
        self._head_VD = _head_view(stack) if self.is_host else None
        self._folded_VD = self._folded_head()
        self._derived: dict[tuple[object, int], tuple[IntArray, Any]] = {}
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
        if self._head_VD is not None:
            return self._head_VD.take(tokens_NK, 0)
        tokens = torch.tensor(tokens_NK, device=self.stack.device)
        return _host(self.stack.head_rows(tokens))

    def fold_rows(self, tokens_NK: IntArray, out_NKD: FloatArray) -> FloatArray | None:
        """Rows of the head, folded as ``FinalNorm.fold`` does; the offsets [N, K] or None.

        Args:
            tokens_NK: Within the vocabulary.
            out_NKD: Where the rows go.
        """
        if self._folded_VD is not None:
            self._folded_VD.take(tokens_NK, 0, out_NKD, "clip")
            return None
        assert self.norm is not None  # scorers ask a norm of another form itself
        return self.norm.fold(self.head_rows(tokens_NK), out_NKD)

    def _folded_head(self) -> FloatArray | None:
        """The whole head, folded beforehand where that is small: it saves a pass per token."""
        norm, size = self.norm, self.stack.vocab * self.stack.width
        if not self.is_host or norm is None or norm.bias_D is not None or size > FOLDED:
            return None
        rows_VD = self.head_rows(np.arange(self.stack.vocab, dtype=np.int32)[None])[0]
        folded_VD: FloatArray = np.empty_like(rows_VD)
        norm.fold(rows_VD, folded_VD)
        return folded_VD

    def derived(self, make: Callable[[Readout, IntArray], T], table_VK: IntArray) -> T:
        """``make(self, table_VK)``, computed once per table and kept for the latest few.

        Another thread than the engine's may ask too, to have it ready.
        """
        key = (make, id(table_VK))
        known = self._derived.get(key)
        if known is None:
            # The table is kept too, so that its id stays its own.
            known = (table_VK, make(self, table_VK))
            with self._deriving:
                while len(self._derived) >= DERIVED:
                    del self._derived[next(iter(self._derived))]
                known = self._derived.setdefault(key, known)
        value: T = known[1]
        return value


def _host(x: Tensor) -> FloatArray:
    array: FloatArray = x.detach().float().cpu().numpy()
    return array


def _head_view(stack: LayerStack) -> FloatArray | None:
    """The head's matrix [V, D] without a copy; None if the model does not show it as float32."""
    model: Any = getattr(stack, "model", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dtype is not torch.float32:
        return None
    some = torch.arange(min(2, len(weight)))
    shown = weight.detach()
    return shown.numpy() if torch.equal(shown[some], stack.head_rows(some[None])[0]) else None
