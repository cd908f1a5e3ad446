"""Offline replay of drafting policies: tokens per measured second along recorded tokens.

Shape suffixes: B documents side by side, N rows, D observation columns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, MAX_PENDING, SOFTMAX_V2, FloatArray, IntArray
from offramp.controller.policies.drafts import ConfidentDraft
from offramp.controller.policies.drafts.draft_trust import ODDS_SCALE, TrustingPolicy
from offramp.controller.policies.drafts.thompson import leading
from offramp.controller.policies.protocols import (
    IndexArray,
    LearningPolicy,
    RoutingPolicy,
    Verdict,
    is_headless,
)
from offramp.envs.cores.draft_core import COUNTS, DraftExitCore
from offramp.envs.cores.draft_tables import CandidateDrafts, DraftPrices
from offramp.envs.cores.draft_view import FEATURES
from offramp.envs.traces.tokens import TokenTraces

Decide = Callable[[FloatArray], IndexArray]
"""Actions [N] of observations [N, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftReplay:
    """What a drafting policy earned, summed over all documents.

    Attributes:
        rate: Tokens per full-depth token's time: the speed-up over full depth.
        counts: Tokens, cycles, drafts, accepted, asked, layer_calls.
        seconds: Seconds that the decoding takes, by measured costs.
    """

    rate: float
    counts: dict[str, int]
    seconds: float


def at_exits(traces: TokenTraces, exits: tuple[int, ...], *, states: bool = False) -> TokenTraces:
    """Show the tokens as if only these exits had been recorded.

    Args:
        traces: Recorded tokens.
        exits: The exits to show.
        states: Whether their states are shown, too, which takes memory.

    Raises:
        ConfigError: one was not.
    """
    recorded = traces.header.exits
    missing = sorted(set(exits) - set(recorded))
    if missing:
        raise ConfigError("exits", f"{missing} were not recorded", f"Choose among {recorded}")
    kept = [recorded.index(layer) for layer in exits]
    names = ("features_NEF", "softmax_NES", "exit_token_NE", "agree_NE", "gap_NE", "right_NE")
    arrays: dict[str, Any] = {name: getattr(traces, name)[:, kept] for name in names}
    if states and traces.state_NED is not None:
        arrays["state_NED"] = traces.state_NED[:, kept]
    header = replace(traces.header, exits=exits)
    return replace(traces, header=header, **{"state_NED": None} | arrays)


def replay_drafts(
    policy: RoutingPolicy,
    traces: TokenTraces,
    costs: CostTable,
    max_pending: int = MAX_PENDING,
    odds_NE: FloatArray | None = None,
) -> DraftReplay:
    """Decode all documents from their first token under a policy.

    A policy that learns is copied, decodes one document after the other, and is told its verdicts
    after each deep pass; any other decodes them side by side.

    Args:
        policy: The policy.
        traces: Recorded tokens.
        costs: What a token's parts cost, as measured.
        max_pending: Drafts that may be open.
        odds_NE: Log-odds that the recorded exits' tokens are right, as the policy holds them; None:
            as their top-1 probabilities say. Only policies of trust read them.

    Raises:
        ConfigError: it asks at an exit that was not recorded, or one of both is headless.
    """
    shown = at_exits(traces, policy.exits)
    headless = isinstance(traces, CandidateDrafts)
    if is_headless(policy) != headless:
        kind = "candidates" if headless else "the head's tokens"
        raise ConfigError("traces", f"hold {kind}, which the policy does not draft")
    probes = policy.schema is not None
    prices = DraftPrices.of(costs, max_pending, policy.exits, probes=probes, headless=headless)
    firsts = _firsts(shown)
    if isinstance(policy, LearningPolicy):
        learner = copy.deepcopy(policy)
        decide = decider(learner)
        cores = [_core(shown, costs, prices, firsts[at : at + 1]) for at in range(len(firsts))]
        infos = [_decode_learning(core, learner, decide) for core in cores]
        return _sum(infos, prices)
    if odds_NE is not None:
        odds_NE = odds_NE[:, [traces.header.exits.index(layer) for layer in policy.exits]]
    return _side_by_side(decider(policy), _core(shown, costs, prices, firsts, odds_NE))


def replay_decisions(
    decide: Decide,
    traces: TokenTraces,
    costs: CostTable,
    max_pending: int = MAX_PENDING,
    odds_NE: FloatArray | None = None,
) -> DraftReplay:
    """Decode all documents side by side from their first token, as ``decide`` says."""
    headless = isinstance(traces, CandidateDrafts)
    exits = traces.header.exits
    prices = DraftPrices.of(costs, max_pending, exits, headless=headless)
    return _side_by_side(decide, _core(traces, costs, prices, _firsts(traces), odds_NE))


def decider(policy: RoutingPolicy, recorded: tuple[int, ...] = ()) -> Decide:
    """A policy as a function of the environment's observation.

    Args:
        policy: The policy.
        recorded: Exits of the environment, the policy's among them; () are the policy's.
    """
    recorded = recorded or policy.exits
    exits = len(recorded)
    # Where the policy's own exits, and the end, are among those recorded.
    place_E1 = np.array([*map(recorded.index, policy.exits), exits])
    own = {int(place): here for here, place in enumerate(place_E1)}
    trusts = isinstance(policy, TrustingPolicy)

    def decide(obs_ND: FloatArray) -> IndexArray:
        here_N = np.rint(obs_ND[:, -1] * exits).astype(np.int64) - 1
        outlook_NC = np.ascontiguousarray(obs_ND[:, FEATURES:-3])
        actions_N = np.zeros(len(obs_ND), np.int64)
        for here in np.unique(here_N).tolist():
            rows = here_N == here
            trust = (obs_ND[rows, -2],) if trusts else ()
            if here < 0:
                actions_N[rows] = place_E1[policy.start(outlook_NC[rows], *trust)]
                continue
            features_NF = as_read(policy, obs_ND[rows, :FEATURES])
            odds = (obs_ND[rows, -3] * ODDS_SCALE,) if trusts else ()
            seen = (features_NF, outlook_NC[rows], *trust, *odds)
            target_N = place_E1[policy.route(own[here], *seen)]
            actions_N[rows] = np.where(target_N == exits, exits, target_N - here)
        return actions_N

    return decide


def as_read(policy: RoutingPolicy, shown_NF: FloatArray) -> FloatArray:
    """What the environment shows, SOFTMAX_V2's columns, as the policy reads it; others are 0."""
    if not is_headless(policy):
        return shown_NF
    features_NF = np.zeros((len(shown_NF), CANDIDATES_V1.width), np.float32)
    features_NF[:, [CANDIDATES_V1.index(name) for name in SOFTMAX_V2.columns]] = shown_NF
    return features_NF


def _side_by_side(decide: Decide, core: DraftExitCore) -> DraftReplay:
    obs_BD = core.observation()
    while not (step := core.step(decide(obs_BD))).terminated_B.all():
        obs_BD = step.obs_BD
    return _sum([step.finals.info], core.prices)


def _decode_learning(core: DraftExitCore, policy: Any, decide: Decide) -> dict[str, Any]:
    obs_1D = core.observation()
    left: list[Verdict] = []
    while True:
        token, here, cycles = core.standing(0)
        action_1 = decide(obs_1D)
        if here >= 0 and action_1[0] == 0:
            right = bool(core.tables.right_NE[token, here])
            left.append(Verdict(here, obs_1D[0, :FEATURES], right))
        step = core.step(action_1)
        if step.terminated_B[0] or core.standing(0)[2] > cycles:
            if left:
                policy.learn(left[: leading(left) + 1])
            left = []
        if step.terminated_B[0]:
            return step.finals.info
        obs_1D = step.obs_BD


def _firsts(traces: TokenTraces) -> IndexArray:
    return np.flatnonzero(np.diff(traces.document_N, prepend=-1))


def _core(
    traces: TokenTraces,
    costs: CostTable,
    prices: DraftPrices,
    first_B: IndexArray,
    odds_NE: FloatArray | None = None,
) -> DraftExitCore:
    core = DraftExitCore(
        traces,
        costs,
        num_envs=len(first_B),
        max_pending=len(prices.layer_W) - 1,
        autoreset=False,
        odds=odds_NE,
    )
    core.prices = prices
    core.reset(tokens=first_B)
    return core


def _sum(infos: list[dict[str, Any]], prices: DraftPrices) -> DraftReplay:
    counts = {name: int(sum(info[name].sum() for info in infos)) for name in COUNTS}
    seconds = float(sum(info["seconds"].sum() for info in infos))
    rate = counts["tokens"] / seconds * prices.full_s
    return DraftReplay(rate=rate, counts=counts, seconds=seconds)


THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""η tried for the confidence stop."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A policy at its best setting.

    Attributes:
        name: Family and setting.
        policy: The policy, before it has learned from verdicts.
        offline: What it earned on validation documents.
    """

    name: str
    policy: RoutingPolicy
    offline: DraftReplay


def bounds(max_pending: int) -> tuple[int, ...]:
    """Most drafts a cycle to try, of rules that stop by themselves but not always in time.

    >>> bounds(8), bounds(24)
    ((8,), (8, 24))
    """
    return tuple(sorted({min(MAX_PENDING, max_pending), max_pending}))


def confident_grid(
    validation: TokenTraces,
    costs: CostTable,
    candidates_VK: IntArray | None = None,
    max_pending: int = MAX_PENDING,
) -> list[Chosen]:
    """Every (exit, η, bound) of Kangaroo's rule, the best first; headless if a table is given."""
    name = "confidence stop" if candidates_VK is None else "headless confidence stop"
    tried = [
        (
            f"{name}, exit {layer}, η {eta:g}, at most {length}",
            ConfidentDraft(
                layer=layer,
                threshold=eta,
                length=length,
                max_pending=max_pending,
                candidates_VK=candidates_VK,
            ),
        )
        for layer in validation.header.exits
        for eta in THRESHOLDS
        for length in bounds(max_pending)
    ]
    return ranked(tried, validation, costs, max_pending)


def ranked(
    tried: Sequence[tuple[str, RoutingPolicy]],
    validation: TokenTraces,
    costs: CostTable,
    max_pending: int = MAX_PENDING,
    odds_NE: FloatArray | None = None,
) -> list[Chosen]:
    """The policies tried, the fastest on validation documents first."""
    found = [
        Chosen(name, policy, replay_drafts(policy, validation, costs, max_pending, odds_NE))
        for name, policy in tried
    ]
    return sorted(found, key=lambda each: -each.offline.rate)
