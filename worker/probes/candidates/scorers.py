"""Who computes the candidate probe's columns: compiled code on the host, or the model's device.

Shape suffixes: N rows, K candidates, D width, F features.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.worker.model.transfers import fetch, upload
from offramp.worker.probes.candidates.kernel import (
    BEST,
    LOGIT_SCALE,
    SMALLEST,
    Rows,
    candidate_features,
    remember,
)
from offramp.worker.probes.readout import Readout, raw

Start = tuple[IntArray, FloatArray, FloatArray]


class Scorer(Protocol):
    """Features of the same candidates, state after state."""

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """All columns, [N, F]; ``x_ND`` is then the last state, and the caller may overwrite it."""
        ...

    def best_N(self) -> IntArray:
        """The candidate of each row that the last state found best, [N]."""
        ...

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        ...


class HostScorer:
    """One compiled call per exit; the head's rows are read where they lie.

    Args:
        readout: The model's norm and head.
        head_VD: The head, or what of it is scored.
        candidates_NK: The candidates' tokens.
        start: Their places in ``head_VD`` [N, K]; last state [N, D], and memory [N, M].
        exits: Number of exits the policy may ask at.
        x_is_bits: Whether states come as bits.
    """

    def __init__(
        self,
        readout: Readout,
        head_VD: Rows,
        candidates_NK: IntArray,
        start: Start,
        exits: int,
        x_is_bits: bool,
    ) -> None:
        norm = readout.norm
        assert norm is not None  # another form is left to the model
        self._head_VD = head_VD
        self._norm = (readout.norm_2D, norm.eps, norm.is_centred)
        self._candidates_NK = candidates_NK
        self._places_NK, self._last_ND, self._memory_NM = start
        self._exits = exits
        self._are_bits = (head_VD.dtype == np.uint16, x_is_bits)

    @classmethod
    def of_rows(
        cls,
        readout: Readout,
        candidates_NK: IntArray,
        x_ND: Tensor,
        place_N: FloatArray,
        exits: int,
    ) -> HostScorer:
        """For rows with these candidates; ``x_ND`` is what comes before their first states."""
        head_VD, places_NK = readout.head_VD, candidates_NK
        if head_VD is None:
            head_VD = readout.head_rows(candidates_NK).reshape(-1, readout.stack.width)
            places = np.arange(candidates_NK.size, dtype=np.int32)
            places_NK = places.reshape(candidates_NK.shape)
        state_ND = packed(x_ND)
        is_bits = state_ND.dtype == np.uint16
        start = (places_NK, *remember(state_ND, is_bits, place_N))
        return cls(readout, head_VD, candidates_NK, start, exits, is_bits)

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """Compute all columns, [N, F]."""
        features_NF: FloatArray = candidate_features(
            self._head_VD, self._places_NK, packed(x_ND), self._norm, self._last_ND,
            self._memory_NM, depth, self._exits, self._are_bits,
        )  # fmt: skip
        return features_NF

    def best_N(self) -> IntArray:
        """Name the best candidates, [N]."""
        best_N: IntArray = _taken(self._candidates_NK, self._memory_NM[:, BEST])
        return best_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._candidates_NK = self._candidates_NK[stay_N]
        self._places_NK = self._places_NK[stay_N]
        self._last_ND, self._memory_NM = self._last_ND[stay_N], self._memory_NM[stay_N]


class DeviceRows(NamedTuple):
    """What is remembered of rows, on the device.

    Attributes:
        candidates_NK: The tokens that are scored.
        head_NKD: Their rows of the LM head.
        place_N: Position / context length.
        last_ND: State of the last probe, float32.
        best_N: Place of the best candidate; −1: none yet.
        top1_N: Probability of that candidate.
        run_N: Probes in a row with it.
    """

    candidates_NK: Tensor
    head_NKD: Tensor
    place_N: Tensor
    last_ND: Tensor
    best_N: Tensor
    top1_N: Tensor
    run_N: Tensor


class DeviceScorer:
    """In torch, on the model's device and through its own norm; what comes back is one transfer.

    Args:
        readout: The model's norm and head.
        candidates_NK: The candidates' tokens.
        x_ND: What comes before the rows' first states.
        place_N: Position / context length of each row's token.
        exits: Number of exits the policy may ask at.
    """

    def __init__(
        self,
        readout: Readout,
        candidates_NK: IntArray,
        x_ND: Tensor,
        place_N: FloatArray,
        exits: int,
    ) -> None:
        self._stack, device = readout.stack, readout.stack.device
        self._exits = exits
        tokens_NK = upload(candidates_NK, device)
        nothing_N = torch.zeros(len(x_ND), device=device)
        self._rows = DeviceRows(
            candidates_NK=tokens_NK,
            head_NKD=self._stack.head_rows(tokens_NK),
            place_N=upload(place_N, device, torch.float32),
            last_ND=x_ND.float().clone(),  # the caller may overwrite its states
            best_N=torch.full((len(x_ND),), -1, device=device),
            top1_N=nothing_N,
            run_N=nothing_N,
        )
        self._named_N = np.empty(0, np.int32)

    def columns(self, depth: float, x_ND: Tensor) -> Tensor:
        """Compute all columns on the device, [N, F] float32; nothing waits for them."""
        rows = self._rows
        scores_NK = torch.bmm(rows.head_NKD, self._stack.norm(x_ND).unsqueeze(-1)).squeeze(-1)
        sure_N4, best_N = _sure(scores_NK.float())
        top1_N, agrees_N = sure_N4[:, 0], best_N == rows.best_N
        change_N = torch.where(rows.best_N < 0, 0.0, top1_N - rows.top1_N)
        run_N = torch.where(agrees_N, rows.run_N + 1.0, 0.0)
        state_ND = x_ND.float()
        motion_N2 = _motion(state_ND, rows.last_ND)
        last_ND = state_ND.clone() if state_ND is x_ND else state_ND
        self._rows = rows._replace(last_ND=last_ND, best_N=best_N, top1_N=top1_N, run_N=run_N)
        depth_N = torch.full_like(change_N, depth)
        since = (agrees_N.float(), run_N / self._exits, change_N, depth_N, rows.place_N)
        return torch.cat((sure_N4, motion_N2, torch.stack(since, dim=-1)), dim=-1)

    def features(self, depth: float, x_ND: Tensor) -> FloatArray:
        """Compute all columns, [N, F]; the best candidates come along."""
        columns_NF = self.columns(depth, x_ND)
        rows = self._rows
        named_N1 = rows.candidates_NK.gather(1, rows.best_N[:, None])
        columns_NF, named_N1 = fetch(columns_NF, named_N1)
        self._named_N = named_N1[:, 0].numpy().astype(np.int32)
        features_NF: FloatArray = columns_NF.numpy()
        return features_NF

    def best_N(self) -> IntArray:
        """Name the best candidates, [N]."""
        return self._named_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        if len(self._named_N):
            self._named_N = self._named_N[stay_N]
        stay_M = upload(np.flatnonzero(stay_N), self._stack.device)
        self._rows = DeviceRows(*(part.index_select(0, stay_M) for part in self._rows))


def _sure(scores_NK: Tensor) -> tuple[Tensor, Tensor]:
    """top1, margin, entropy / ln K and top score of each row's softmax; the best one's place."""
    top_N, second_N = scores_NK.topk(2, dim=-1).values.unbind(-1)
    shifted_NK = scores_NK - top_N[:, None]
    weights_NK = shifted_NK.exp()
    total_N = weights_NK.sum(-1)
    second_N = (second_N - top_N).exp()
    mean_N = (weights_NK * shifted_NK).sum(-1) / total_N
    entropy_N = (total_N.log() - mean_N) / math.log(scores_NK.shape[1])
    parts = (1.0 / total_N, (1.0 - second_N) / total_N, entropy_N, top_N / LOGIT_SCALE)
    # Of equal scores the first counts, as on the host; topk may name any of them.
    return torch.stack(parts, dim=-1), scores_NK.argmax(-1)


def _motion(state_ND: Tensor, last_ND: Tensor) -> Tensor:
    """Cosine of each state to the last one, and the logarithm of their lengths' ratio, [N, 2]."""
    dots_N = torch.linalg.vecdot(state_ND, last_ND)
    squares_N = torch.linalg.vecdot(state_ND, state_ND).clamp(min=SMALLEST)
    before_N = torch.linalg.vecdot(last_ND, last_ND).clamp(min=SMALLEST)
    cosine_N = dots_N / squares_N.sqrt() / before_N.sqrt()
    return torch.stack((cosine_N, 0.5 * (squares_N / before_N).log()), dim=-1)


def make_scorer(
    readout: Readout, candidates_NK: IntArray, x_ND: Tensor, place_N: FloatArray, exits: int
) -> Scorer:
    """The cheapest scorer that can serve the model; ``x_ND`` is what comes before the first."""
    if readout.is_host and readout.norm is not None:
        return HostScorer.of_rows(readout, candidates_NK, x_ND, place_N, exits)
    return DeviceScorer(readout, candidates_NK, x_ND, place_N, exits)


def _taken(candidates_NK: IntArray, best_N: ArrayLike) -> IntArray:
    best_N1 = np.asarray(best_N, np.int64)[:, None]
    return np.take_along_axis(candidates_NK, best_N1, axis=1)[:, 0]


def packed(x_ND: Tensor) -> Rows:
    """States without gaps, as compiled code reads them; may share memory with ``x_ND``."""
    states: Rows = raw(x_ND)
    return states if states.flags.c_contiguous else states.copy()
