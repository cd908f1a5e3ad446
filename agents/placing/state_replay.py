"""Offline replay over states, of policies that skip exits: routers, and p̂ on some of the exits.

A policy that skips exits sees features compared to the exit it probed before. Every state's
features can be computed, so that a policy is a table that tokens are replayed through.

Shape suffixes: N tokens, E exits, F features, K exits of a subset, Q subsets, Z thresholds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.agents.learning.export import Weights
from offramp.agents.learning.stopping_problem import (
    START,
    State,
    StateObservations,
    StoppingProblem,
)
from offramp.agents.placing.replay import TakenExits
from offramp.controller.costs.table import CostTable
from offramp.controller.features import OUTLOOK_V1, BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.net import MAX_ROWS
from offramp.controller.policies.router import MlpRouter
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import TokenTraces

MOST_EXITS = 5
"""Exits of a subset at most; of ten, that makes 637 subsets."""


class StateTable:
    """All states' observations of some tokens.

    Args:
        traces: Recorded tokens, each probed at every exit.
        costs: What a token's parts cost, as measured.
    """

    def __init__(self, traces: TokenTraces, costs: CostTable) -> None:
        exits = traces.header.exits
        self.traces = traces
        token_costs = TokenCosts.of(costs, exits, adapters=traces.header.adapters)
        self.problem = StoppingProblem(token_costs, len(exits) + 1)
        self.states = self.problem.states
        self._observations = StateObservations(traces, self.states)
        self.schema = self._observations.schema

    def features(self, state: State) -> FloatArray:
        """Features of all tokens in one state, [N, F]."""
        return self._observations.at(state)

    def replay_router(self, router: MlpRouter) -> TakenExits:
        """Where a router on the recorded exits sends each token."""
        tokens, exits = len(self.traces), self.problem.exits
        nothing = np.zeros((tokens, OUTLOOK_V1.width), np.float32)
        here_N = np.asarray(router.start(nothing)).copy()
        before_N = np.full(tokens, START)
        taken_N, probes_N = here_N.copy(), np.zeros(tokens, np.int64)
        for here in range(exits):
            for before in range(START, here):
                at = np.flatnonzero((here_N == here) & (before_N == before))
                if not len(at):
                    continue
                features = self._observations.at(State(before, here), at)
                next_N = router.route(here, features, nothing[at])
                probes_N[at] += 1
                taken_N[at] = next_N
                onward = at[next_N != here]
                before_N[onward], here_N[onward] = here, next_N[next_N != here]
                here_N[at[next_N == here]] = START
        return TakenExits(taken_N, probes_N)

    def logits(self, phat: Weights) -> dict[State, FloatArray]:
        """The classifier's logit of every token in each state at an exit, [N] each."""
        policy = MlpPolicy((1,), self._observations.schema, phat)
        found = {}
        for state in self.states[1:]:
            rows_NF = self.features(state)
            parts = [
                policy.logits(rows_NF[at : at + MAX_ROWS]).copy()
                for at in range(0, len(rows_NF), MAX_ROWS)
            ]
            found[state] = np.concatenate(parts)
        return found

    def replay_subset(
        self, logits: dict[State, FloatArray], subset: Sequence[int], threshold: float
    ) -> TakenExits:
        """Where p̂ on some of the exits sends each token.

        Args:
            logits: The classifier's logits of all tokens in each state, as ``logits`` gives them.
            subset: Indices of the exits asked at, ascending.
            threshold: Least logit at which a token leaves.
        """
        leaves = [
            logits[State(before, here)] > threshold
            for before, here in itertools.pairwise((START, *subset))
        ]
        return first_of(leaves, subset, self.problem.exits)


def first_of(leaves: Sequence[BoolArray], subset: Sequence[int], exits: int) -> TakenExits:
    """Each token leaves at the first of some exits that lets it."""
    leaves_NK = np.stack(leaves, axis=1)
    any_N = leaves_NK.any(1)
    place_N = leaves_NK.argmax(1)
    taken_N = np.where(any_N, np.asarray(subset)[place_N], exits)
    return TakenExits(taken_N, np.where(any_N, place_N + 1, len(subset)))


def subsets(exits: int, most: int = MOST_EXITS) -> Iterator[tuple[int, ...]]:
    """Every subset of up to ``most`` exits.

    >>> list(subsets(3, 2))
    [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)]
    """
    for size in range(1, min(most, exits) + 1):
        yield from itertools.combinations(range(exits), size)


@dataclass(frozen=True, slots=True)
class SubsetGrid:
    """p̂ on every subset of exits at every threshold: agreement and cost, [Q, Z].

    Attributes:
        subsets: The Q subsets, as indices of exits.
        thresholds: The Z thresholds, in logits.
        agreement_QZ: Share of tokens that are full depth's.
        cost_QZ: Mean cost, in units of a full-depth token's time.
    """

    subsets: list[tuple[int, ...]]
    thresholds: list[float]
    agreement_QZ: NDArray[np.float64]
    cost_QZ: NDArray[np.float64]

    @classmethod
    def of(cls, table: StateTable, phat: Weights, thresholds: Sequence[float]) -> SubsetGrid:
        """Send all tokens of a table through all of them."""
        logits = table.logits(phat)
        every = list(subsets(table.problem.exits))
        agreement_QZ = np.zeros((len(every), len(thresholds)))
        cost_QZ = np.zeros_like(agreement_QZ)
        for q, subset in enumerate(every):
            for z, threshold in enumerate(thresholds):
                taken = table.replay_subset(logits, subset, threshold)
                agreement_QZ[q, z] = taken.quality_N(table.traces).mean()
                cost_QZ[q, z] = taken.cost_N(table.problem.costs).mean()
        return cls(every, list(thresholds), agreement_QZ, cost_QZ)

    def cheapest(self, agreement: float) -> tuple[tuple[int, ...], float]:
        """Subset and threshold that keep an agreement at the least cost; else the most agreeing."""
        kept_QZ = self.agreement_QZ >= min(agreement, self.agreement_QZ.max())
        return self._at(int(np.where(kept_QZ, self.cost_QZ, np.inf).argmin()))

    def best(self, preference: float) -> tuple[tuple[int, ...], float]:
        """Subset and threshold of the highest agreement − λ·cost."""
        return self._at(int((self.agreement_QZ - preference * self.cost_QZ).argmax()))

    def _at(self, index: int) -> tuple[tuple[int, ...], float]:
        q, z = divmod(index, len(self.thresholds))
        return self.subsets[q], self.thresholds[z]
