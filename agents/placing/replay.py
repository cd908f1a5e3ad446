"""Offline replay: which exit a policy would take on recorded tokens.

Shape suffixes: N tokens, M rows asked, E the policy's exits, F features, C outlook columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.agents.placing.recorded_features import RecordedFeatures, documents, outlook
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import (
    IndexArray,
    LearningPolicy,
    Policy,
    RoutingPolicy,
    StatefulPolicy,
    Verdict,
)
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import Quality, TokenTraces

VERDICT_TOKENS = 8
"""Tokens after which a learning policy gets its verdicts: the engine's default ``max_pending``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a policy would have done.

    Attributes:
        agreement: Share of tokens equal to the full-depth token.
        mean_layers: Mean layers executed.
        cost: Mean cost in units of a full-depth token's time, probes made included.
    """

    agreement: float
    mean_layers: float
    cost: float


@dataclass(frozen=True, slots=True)
class TakenExits:
    """Where each token would have left.

    Attributes:
        taken_N: Index into the recorded exits of where it leaves; their number for full depth.
        probes_N: Exits at which it was asked.
    """

    taken_N: IndexArray
    probes_N: IndexArray

    def quality_N(self, traces: TokenTraces, quality: Quality = "agreement") -> FloatArray:
        """Score each token that would be emitted, [N]; by agreement, 1 if it is full depth's."""
        return traces.quality(quality)[np.arange(len(self.taken_N)), self.taken_N]

    def cost_N(self, costs: TokenCosts) -> NDArray[np.float64]:
        """Price each token, in units of a full-depth token's time; a first exit is not decided."""
        return costs.price(self.taken_N, self.probes_N)


def replay(policy: Policy, traces: TokenTraces, costs: CostTable) -> Replay:
    """Send every recorded token through a policy.

    Offline numbers are optimistic: the cache the traces were recorded with is exact. Use them to
    place operating points, never to report one.

    Raises:
        ConfigError: the policy asks at a layer, or reads a schema, that was not recorded.
        PolicyFaultError: it routes a row to no exit ahead.
    """
    walked = walk(policy, traces)
    rows_N = np.arange(len(traces))
    full_N = np.ones((len(traces), 1), np.float32)
    agree_NE1 = np.concatenate([traces.agree_NE, full_N], axis=1)
    layer_E1 = np.asarray([*traces.header.exits, traces.header.layers])
    return Replay(
        agreement=float(agree_NE1[rows_N, walked.taken_N].mean()),
        mean_layers=float(layer_E1[walked.taken_N].mean()),
        cost=mean_cost(policy, walked, traces, costs),
    )


def mean_cost(policy: Policy, walked: TakenExits, traces: TokenTraces, costs: CostTable) -> float:
    """Average the cost of all tokens, in units of a full-depth token's time."""
    adapters = [layer for layer in traces.header.adapters if layer in policy.exits]
    under = TokenCosts.under(policy.schema, costs, traces.header.exits, adapters)
    return float(walked.cost_N(under).mean())


def walk(policy: Policy, traces: TokenTraces) -> TakenExits:
    """Where each token leaves, and how often it is asked.

    A policy that learns, or whose decisions change the next ones, is copied first and decides the
    tokens in order. One that learns is told how they compare to full depth every VERDICT_TOKENS
    tokens of a document.

    Raises:
        ConfigError, PolicyFaultError: as ``replay``.
    """
    view = RecordedFeatures(policy, traces)
    walked = TakenExits(
        taken_N=np.full(len(traces), len(traces.header.exits)),
        probes_N=np.zeros(len(traces), np.int64),
    )
    outlook_NC = outlook(traces)
    if not isinstance(policy, LearningPolicy | StatefulPolicy):
        _walk(_decider(policy), view, outlook_NC, np.arange(len(traces)), walked)
        return walked
    copied = copy.deepcopy(policy)
    decide = _decider(copied)
    for rows_M in _blocks(traces):
        seen: dict[int, FloatArray] = {}
        _walk(decide, view, outlook_NC, rows_M, walked, seen)
        if isinstance(copied, LearningPolicy):
            copied.learn([_verdict(traces, view, row, walked, seen[row]) for row in sorted(seen)])
    return walked


Decider = Callable[[int, FloatArray, FloatArray], IndexArray]
"""Says, by exit (−1: before the first), features and outlook, where rows are asked next."""


def _decider(policy: Policy) -> Decider:
    exits = len(policy.exits)

    # Asked here once: isinstance on a protocol costs more than a small decision.
    if isinstance(policy, RoutingPolicy):
        router = policy

        def route(here: int, features_MF: FloatArray, outlook_MC: FloatArray) -> IndexArray:
            if here < 0:
                return _checked(router.start(outlook_MC), 0, exits)
            return _checked(router.route(here, features_MF, outlook_MC), here, exits)

        return route
    leaver = policy

    def ask_in_order(here: int, features_MF: FloatArray, outlook_MC: FloatArray) -> IndexArray:
        if here < 0:
            return np.zeros(len(outlook_MC), np.int64)
        return np.where(leaver.leave(features_MF), here, here + 1)

    return ask_in_order


def _walk(
    decide: Decider,
    view: RecordedFeatures,
    outlook_NC: FloatArray,
    rows_M: IndexArray,
    walked: TakenExits,
    seen: dict[int, FloatArray] | None = None,
) -> None:
    """Send some rows through a policy; ``seen`` takes what was probed of each where it left."""
    blank_MF = np.empty((len(rows_M), 0), np.float32)
    ask_M = decide(-1, blank_MF, outlook_NC[rows_M])
    for here, recorded in enumerate(view.recorded):
        asked = np.flatnonzero(ask_M == here)
        if not len(asked):
            continue
        rows = rows_M[asked]
        features_MF = view.features(here, rows)
        next_M = decide(here, features_MF, outlook_NC[rows])
        leaves_M = next_M == here
        walked.probes_N[rows] += 1
        walked.taken_N[rows[leaves_M]] = recorded
        if seen is not None:
            seen.update(zip(rows[leaves_M].tolist(), features_MF[leaves_M], strict=True))
        ask_M[asked] = np.where(leaves_M, -1, next_M)


def _checked(next_M: IndexArray, here: int, exits: int) -> IndexArray:
    if len(next_M) and not (here <= next_M.min() and next_M.max() <= exits):
        raise PolicyFaultError(f"it routes rows from exit {here} to {next_M.min()}…{next_M.max()}")
    return next_M.astype(np.int64)


def _blocks(traces: TokenTraces) -> list[IndexArray]:
    """Rows in order, at most VERDICT_TOKENS of one document at a time."""
    return [
        rows[start : start + VERDICT_TOKENS]
        for rows in documents(traces)
        for start in range(0, len(rows), VERDICT_TOKENS)
    ]


def _verdict(
    traces: TokenTraces,
    view: RecordedFeatures,
    row: int,
    walked: TakenExits,
    features_F: FloatArray,
) -> Verdict:
    recorded = int(walked.taken_N[row])
    return Verdict(
        exit_index=view.recorded.index(recorded),
        features_F=features_F,
        agreed=bool(traces.agree_NE[row, recorded]),
    )
