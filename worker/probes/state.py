"""STATE_V1: statistics of the hidden state, which need no matrix at all.

Shape suffixes: N rows, D width, F features; 5 the rows that are multiplied with each other.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import STATE_V1, BoolArray, FloatArray
from offramp.worker.model.transfers import fetch, take
from offramp.worker.probes.probe import ProbeInputs

TINY = 1e-30
"""Added to squares that divide or whose logarithm is taken: an update may be all zeros."""

ONES, STATE, UPDATE = 0, 1, 3
"""Places in the matrix of products; the state and the update before the last one follow theirs."""


class StateProbe:
    """STATE_V1: length, direction and shape of the hidden state and of its last update.

    All products come from one small matrix times itself; the rest is scalar, row by row.

    Args:
        inputs: What the rows offer; neither norm nor head nor candidates are read.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        stack = inputs.readout.stack
        self._host = inputs.readout.host
        self._layers = stack.layers
        self._position_N = inputs.positions_N / stack.context
        self._vectors_N5D = np.zeros((len(inputs.x_ND), 5, stack.width), np.float32)
        self._vectors_N5D[:, ONES] = 1.0
        self._vectors_N5D[:, STATE] = self._host(inputs.x_ND)

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of STATE_V1, [N, F]."""
        products, peaks = self._products(x_ND)
        out_NF = np.empty((len(products), STATE_V1.width), np.float32)
        for row, (product, peak) in enumerate(zip(products, peaks, strict=True)):
            place = (layer / self._layers, self._position_N[row])
            out_NF[row] = (*_statistics(product, peak), *place)
        return out_NF

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._vectors_N5D = self._vectors_N5D[stay_N]
        self._position_N = self._position_N[stay_N]

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None

    def _products(self, x_ND: Tensor) -> tuple[list[list[list[float]]], list[float]]:
        """Products of each row's five vectors, [N, 5, 5], and its largest |h_i|, [N]."""
        state_ND = self._host(x_ND)
        vectors = self._vectors_N5D
        vectors[:, STATE + 1] = vectors[:, STATE]
        vectors[:, UPDATE + 1] = vectors[:, UPDATE]
        vectors[:, STATE] = state_ND
        np.subtract(state_ND, vectors[:, STATE + 1], vectors[:, UPDATE])
        products = np.matmul(vectors, vectors.transpose(0, 2, 1)).tolist()
        return products, np.abs(state_ND).max(-1).tolist()


class DeviceStateProbe(StateProbe):
    """STATE_V1 of states on another device: only the products come to the host, in one transfer.

    Args: as for ``StateProbe``.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        stack = inputs.readout.stack
        self._layers = stack.layers
        self._position_N = inputs.positions_N / stack.context
        start_ND = inputs.x_ND.float()
        still_ND = torch.zeros_like(start_ND)
        self._rows_N5D = torch.stack(
            (torch.ones_like(start_ND), start_ND, start_ND, still_ND, still_ND), dim=1
        )

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._rows_N5D = take(self._rows_N5D, np.flatnonzero(stay_N).tolist())
        self._position_N = self._position_N[stay_N]

    def _products(self, x_ND: Tensor) -> tuple[list[list[list[float]]], list[float]]:
        state_ND = x_ND.float()
        ones_ND, last_ND, _, update_ND, _ = self._rows_N5D.unbind(1)
        vectors = (ones_ND, state_ND, last_ND, state_ND - last_ND, update_ND)
        self._rows_N5D = torch.stack(vectors, dim=1)
        products_N55 = torch.bmm(self._rows_N5D, self._rows_N5D.transpose(1, 2))
        products_N55, peaks_N = fetch(products_N55, state_ND.abs().amax(-1))
        return products_N55.tolist(), peaks_N.tolist()


def state_probe(inputs: ProbeInputs) -> StateProbe:
    """The probe of STATE_V1 for where the model's states lie."""
    return (StateProbe if inputs.readout.is_host else DeviceStateProbe)(inputs)


def _statistics(product: list[list[float]], peak: float) -> tuple[float, ...]:
    """The columns from ``cosine`` to ``peak`` of one row, from its products."""
    state, update = product[STATE], product[UPDATE]
    width = product[ONES][ONES]
    square, last_square = state[STATE] + TINY, product[STATE + 1][STATE + 1] + TINY
    update_square, last_update = update[UPDATE] + TINY, product[UPDATE + 1][UPDATE + 1] + TINY
    rms = math.sqrt(square / width)
    return (
        state[STATE + 1] / math.sqrt(square * last_square),
        0.5 * math.log(square / last_square),
        math.sqrt(update_square / square),
        update[UPDATE + 1] / math.sqrt(update_square * last_update),
        state[ONES] / (width * rms),
        math.log(rms),
        math.log(max(peak / rms, TINY)),
    )


class HiddenProbe:
    """``hidden_schema(D)``: the row's state as norm and head read it, copied to the host.

    Args:
        inputs: What the rows offer; only the model's transfer to the host is used.
    """

    def __init__(self, inputs: ProbeInputs) -> None:
        self._host = inputs.readout.host

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """The states, [N, D] float32, a copy."""
        return np.array(self._host(x_ND), np.float32)

    def keep(self, stay_N: BoolArray) -> None:
        """Do nothing: nothing is remembered of a row."""

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None
