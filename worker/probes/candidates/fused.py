"""CANDIDATES_V1 of rows that run under one policy: made once, begun anew with every token.

Shape suffixes: S places for rows, N rows that are asked, K candidates, D width, V vocabulary, F
features, M numbers remembered of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import OUTLOOK_V1, BoolArray, FloatArray, IntArray
from offramp.controller.policies.drafts.draft_router import DraftRouter
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import Policy
from offramp.worker.probes.candidates.fused_kernel import (
    begin_rows,
    fused_decision,
    fused_features,
    fused_route,
)
from offramp.worker.probes.candidates.kernel import BEST, MEMORY
from offramp.worker.probes.candidates.successors import FOLLOWERS, NgramIndex
from offramp.worker.probes.readout import Readout

NONE = (-1,) * (2 * FOLLOWERS)
"""Followers of a row that has none."""


class FusedProbe:
    """What ``CandidateProbe`` computes, in one compiled call for all rows, and no array per token.

    Args:
        readout: Readout of a model on the host, which shows its norm and head.
        policy: The rows', with a candidate table.
        rows: Places for rows.
    """

    def __init__(self, readout: Readout, policy: Policy, rows: int = 1) -> None:
        table_VK, norm, stack = policy.candidates_VK, readout.norm, readout.stack
        assert table_VK is not None
        assert norm is not None
        assert readout.head_VD is not None
        self.places = rows
        self.policy: MlpPolicy | None = policy if type(policy) is MlpPolicy else None
        """Which decides in the same call; None if the policy is of another kind."""
        router = policy if type(policy) is DraftRouter else None
        self.router = router if router is not None and router.is_compiled else None
        """Which routes a lone row in the same call; None if the policy cannot."""
        self._stack, self._table_VK = stack, table_VK
        self._rows = 0
        self._item = 2 if stack.dtype is torch.bfloat16 else 4
        candidates_SK = np.empty((rows, table_VK.shape[1]), np.int32)
        last_SD = np.empty((rows, stack.width), np.float32)
        memory_SM = np.empty((rows, MEMORY), np.float32)
        # What the compiled calls read that never changes, and what they keep.
        bits = (readout.head_VD.dtype == np.uint16, self._item == 2)
        norm_parts = (readout.norm_2D, norm.eps, norm.is_centred)
        self._read = (readout.head_VD, norm_parts, bits, len(policy.exits))
        self._kept = (np.empty(rows, np.int32), candidates_SK, last_SD, memory_SM)
        self._gone_S = np.empty(rows, np.int32)

    def begin(
        self,
        ngrams: Sequence[NgramIndex],
        drafted: Sequence[Sequence[int]],
        x_ND: Tensor,
        positions: Sequence[int],
    ) -> None:
        """Rows begin a token; whoever was asked before is forgotten.

        Args:
            ngrams: Their indices; no more than there are places.
            drafted: Their tokens that the indices do not know.
            x_ND: The tokens' embeddings.
            positions: Position of each token in its row.
        """
        starts: list[int] = []
        for index, tokens, position in zip(ngrams, drafted, positions, strict=True):
            last, own = index.followers(tokens)
            starts += (position, last, *own, *NONE[len(own) :])
        self._rows = len(ngrams)
        starts_NJ = np.array(starts, np.int32).reshape(self._rows, -1)
        context = self._stack.context
        is_bits = self._read[2][1]
        begin_rows(self._table_VK, context, starts_NJ, self._states(x_ND), is_bits, *self._kept)

    def compile(self, x_1D: Tensor) -> None:
        """Call what is compiled once, with any state."""
        self.begin([NgramIndex((0,))], [()], x_1D, [0])
        self.features(1, x_1D)
        if self.policy is not None:
            self.leaving(1, x_1D[:, None])
        if self.router is not None:
            nothing = np.zeros((1, OUTLOOK_V1.width), np.float32)
            fused_route(*self._arguments(1, x_1D), *self.router.compiled_parts(0, nothing))

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """All columns of CANDIDATES_V1, [N, F]."""
        features_NF: FloatArray = fused_features(*self._arguments(layer, x_ND))
        return features_NF

    def leaving(self, layer: int, x_N1D: Tensor) -> tuple[list[int], list[int]]:
        """Ask the policy about all rows, as ``Decider`` says."""
        policy = self.policy
        assert policy is not None
        # float(): a NumPy scalar is another type to the compiled code, which would compile again.
        gone = fused_decision(
            *self._arguments(layer, x_N1D), policy.flat, policy.sizes, float(policy.threshold),
            self._gone_S,
        )  # fmt: skip
        if not gone:
            return [], []
        self._rows -= gone
        # Compiled code returns one list: place n leaves as n, and fails as −1 − n.
        places = self._gone_S[:gone].tolist()
        if min(places) >= 0:
            return places, []
        return [n for n in places if n >= 0], [-1 - n for n in places if n < 0]

    def route(self, layer: int, x_1D: Tensor, here: int, outlook_1C: FloatArray) -> int:
        """Index of the exit that the one row is sent to, or stays at.

        Args:
            layer: Layers executed so far.
            x_1D: Hidden state of the row.
            here: Index of the exit.
            outlook_1C: What the engine knows of it.

        Raises:
            PolicyFaultError: a feature or a logit is not finite.
        """
        assert self.router is not None
        parts = self.router.compiled_parts(here, outlook_1C)
        return self.router.settle(here, *fused_route(*self._arguments(layer, x_1D), *parts))

    def best_N(self) -> IntArray:
        """The best candidates, [N]."""
        at_S, candidates_SK, _, memory_SM = self._kept
        if self._rows == 1:  # in scalars: indexing by arrays takes as long as the probe
            at = at_S[0]
            return candidates_SK[at, int(memory_SM[at, BEST]), None]
        at_N = at_S[: self._rows]
        best_N: IntArray = candidates_SK[at_N, memory_SM[at_N, BEST].astype(np.int64)]
        return best_N

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        at_S, candidates_SK, last_SD, memory_SM = self._kept
        at_N = at_S[: self._rows][stay_N]
        self._rows = len(at_N)
        at_S = np.empty_like(at_S)  # parts read the other arrays at places of their own
        at_S[: self._rows] = at_N
        self._kept = (at_S, candidates_SK, last_SD, memory_SM)

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None

    def _arguments(self, layer: int, x_ND: Tensor) -> tuple[Any, ...]:
        depth = layer / self._stack.layers
        return (*self._read, *self._kept, self._states(x_ND), self._rows, depth)

    def _states(self, x_ND: Tensor) -> tuple[int, int]:
        """Give address and stride of rows; a row's numbers are neighbours, as layers leave them."""
        assert x_ND.stride(-1) == 1
        return x_ND.data_ptr(), x_ND.stride(0) * self._item
