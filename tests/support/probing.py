"""Recordings made of invented hidden states; compared features straight from the definition.

Shape suffixes: T tokens, E exits, S = E + 1 states (embedding, then after each exit), D width,
K candidates, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces

Array = NDArray[np.float64]


@dataclass
class Invented:
    """States and candidate scores of some tokens: every pair of exits can be compared."""

    states_TSD: Array
    scores_TEK: Array
    exits: tuple[int, ...]
    layers: int
    tokens_per_document: int = 20

    def compared(self, token: int, before: int, here: int) -> dict[str, float]:
        """Columns at exit ``here`` if ``before`` was probed before; −1: nothing."""
        now_D, last_D = self.states_TSD[token, here + 1], self.states_TSD[token, before + 1]
        now, last = float(np.linalg.norm(now_D)), float(np.linalg.norm(last_D))
        scores_EK = self.scores_TEK[token]
        return {
            "cosine": float(now_D @ last_D) / now / last,
            "norm_change": math.log(now / last),
            "agrees": float(before >= 0 and scores_EK[here].argmax() == scores_EK[before].argmax()),
            "top1_change": top1(scores_EK[here]) - top1(scores_EK[before]) if before >= 0 else 0.0,
        }

    def features(self, token: int, probed: list[int]) -> FloatArray:
        """All columns after these exits were probed, in order; they end at the present one."""
        exits = len(self.exits)
        run = 0
        for before, here in zip([-1, *probed], probed, strict=False):
            columns = self.compared(token, before, here)
            run = run + 1 if columns["agrees"] else 0
        scores_K = self.scores_TEK[token, probed[-1]]
        chances_K = np.exp(scores_K) / np.exp(scores_K).sum()
        first, second = np.sort(chances_K)[::-1][:2]
        columns |= {
            "top1": first,
            "margin": first - second,
            "entropy": -(chances_K * np.log(chances_K)).sum() / math.log(len(chances_K)),
            "top_logit": scores_K.max() / 10,
            "run_length": run / exits,
            "depth": self.exits[probed[-1]] / self.layers,
            "position": token % self.tokens_per_document / 100,
        }
        return np.array([columns[name] for name in CANDIDATES_V1.columns], np.float32)

    def traces(self, seed: int = 0) -> TokenTraces:
        """As recorded: every exit probed in order. The candidates are the vocabulary."""
        tokens, exits = self.scores_TEK.shape[:2]
        rng = np.random.default_rng(seed)
        chance_TK = rng.dirichlet(np.ones(self.scores_TEK.shape[2]), tokens)
        best_TE = self.scores_TEK.argmax(-1)
        full_T = chance_TK.argmax(-1)
        gap_TE = np.log(np.take_along_axis(chance_TK, best_TE, 1) / chance_TK.max(-1)[:, None])
        next_T: NDArray[np.int64] = rng.integers(self.scores_TEK.shape[2], size=(tokens,))
        document_T = np.arange(tokens) // self.tokens_per_document
        features = [
            [self.features(t, list(range(e + 1))) for e in range(exits)] for t in range(tokens)
        ]
        return TokenTraces(
            header=TraceHeader(
                model="tiny", schema=CANDIDATES_V1.digest, exits=self.exits, layers=self.layers
            ),
            features_NEF=np.array(features, np.float32),
            softmax_NES=np.zeros((tokens, exits, 3), np.float32),
            exit_token_NE=best_TE.astype(np.int32),
            agree_NE=(best_TE == full_T[:, None]).astype(np.float32),
            gap_NE=gap_TE.astype(np.float32),
            right_NE=(best_TE == next_T[:, None]).astype(np.float32),
            full_right_N=(full_T == next_T).astype(np.float32),
            position_N=(np.arange(tokens) % self.tokens_per_document).astype(np.int32),
            document_N=document_T.astype(np.int32),
            documents=tuple(f"{i:064x}" for i in range(int(document_T.max()) + 1)),
        )


def top1(scores_K: Array) -> float:
    chances_K = np.exp(scores_K - scores_K.max())
    return float(chances_K.max() / chances_K.sum())


def invent(
    tokens: int = 60,
    exits: tuple[int, ...] = (2, 4, 5, 7),
    layers: int = 8,
    seed: int = 0,
    straight: bool = False,
) -> Invented:
    """Random states and scores.

    Args:
        straight: What each exit adds is at right angles to all states before, so that the product
            of neighbours' cosines is the cosine.
    """
    rng = np.random.default_rng(seed)
    shape = (tokens, len(exits) + 1, 16)
    if straight:
        steps_TSD = np.zeros(shape)
        for s in range(shape[1]):
            steps_TSD[:, s, s] = rng.uniform(0.5, 2, tokens)
    else:
        steps_TSD = rng.standard_normal(shape)
    scores_TEK = np.cumsum(rng.standard_normal((tokens, len(exits), 5)), 1)
    return Invented(steps_TSD.cumsum(1), scores_TEK, exits, layers)
