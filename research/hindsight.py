"""The hindsight oracle: each token leaves at the first exit that agrees with full depth.

No policy can do this: the labels come from a full-depth pass over the same document. It bounds what
any rule could save, and is reported apart from the rules. Decoded, it need not agree everywhere,
for its exits change the cache that later tokens attend to.

Shape suffixes: N tokens, E exits, F features, C outlook columns, T tokens of the completion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.measure import (
    HeldOut,
    PairedCosts,
    Protocol,
    Split,
    measure_quality,
    timed_document,
)
from offramp.agents.evaluation.scores import SUMS, Scores
from offramp.agents.placing.contenders import Contender
from offramp.agents.placing.replay import TakenExits
from offramp.controller.costs.table import CostTable
from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.policies.rules.in_order import TOKENS
from offramp.controller.traces import TraceHeader
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.recording.recorder import record_document

FAMILY = "hindsight oracle"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedExit:
    """The n-th token of the completion leaves where the plan says, without a probe.

    Attributes:
        exits: Layers at which rows may leave, ascending.
        plan_T: Index into the exits for each step, E for all layers; later tokens run them all.
    """

    exits: tuple[int, ...]
    plan_T: IndexArray
    schema: FeatureSchema | None = None
    candidates_VK: IntArray | None = None

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """The planned exit of each row's step; E for all layers, [N]."""
        step_N = np.rint(outlook_NC[:, OUTLOOK_V1.index("step")] * TOKENS).astype(np.int64)
        inside_N = step_N < len(self.plan_T)
        planned_N = self.plan_T[np.minimum(step_N, len(self.plan_T) - 1)]
        return np.where(inside_N, planned_N, len(self.exits))

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Everybody leaves where they were sent, [N]."""
        return np.full(len(features_NF), here)


def oracle(traces: TokenTraces, costs: CostTable, trade_off: float = 0.0) -> TakenExits:
    """The best place to leave for each token, at no probe.

    Args:
        traces: Tokens with their labels.
        costs: Measured costs; its probes and decisions are not charged.
        trade_off: λ. At 0 the cheapest place that agrees with full depth; else the one with the
            largest agreement − λ · cost.
    """
    if trade_off > 0:
        cost_E1 = TokenCosts.under(
            None, costs, traces.header.exits, traces.header.adapters
        ).leave_E1
        taken_N = np.argmax(traces.quality("agreement") - trade_off * cost_E1, axis=1)
    else:
        taken_N = first_agreeing(traces)
    return TakenExits(taken_N=taken_N, probes_N=np.zeros(len(traces), np.int64))


def first_agreeing(traces: TokenTraces) -> IndexArray:
    """Index of the first exit whose token is full depth's; E where none is, [N]."""
    return np.asarray(np.argmax(traces.quality("agreement") > 0, axis=1))


def plan_of(traces: TokenTraces, prompt_tokens: int = 1) -> PlannedExit:
    """The oracle of one document's tokens as a policy: its n-th token leaves where planned.

    Args:
        traces: Tokens of one document, in order, from its first.
        prompt_tokens: Tokens read as a prompt; the last one's row gives step 0.
    """
    # Step 0 is the token that the prompt's pass emits.
    plan_T = first_agreeing(traces)[prompt_tokens - 1 :]
    return PlannedExit(exits=traces.header.exits, plan_T=plan_T)


def measure_oracle(
    engine: AdaptiveEngine,
    split: Split,
    protocol: Protocol,
    exits: Sequence[int],
    timed_documents: int,
) -> Measured:
    """Teacher-forced tokens of every document and the time of the first few; no lines, no probes.

    Args:
        engine: Idle; decodes what is planned.
        split: Test documents, with full depth's tokens.
        protocol: How much of each document is decoded.
        exits: Layers it may leave after.
        timed_documents: How many of the documents are timed.
    """
    plans = [_plan(engine, document.tokens, protocol, exits) for document in split.documents]
    alone = [
        Split([HeldOut(document.tokens)], [full])
        for document, full in zip(split.documents, split.full, strict=True)
    ]
    scores = [
        measure_quality(engine, plan, one, protocol, FAMILY)
        for plan, one in zip(plans, alone, strict=True)
    ]
    pairs = [
        next(timed_document(engine, [plan], one.documents[0], protocol, 0))[1].seconds
        for plan, one in list(zip(plans, alone, strict=True))[:timed_documents]
    ]
    mine_D, full_D = np.asarray(pairs).T
    contender = Contender(family=FAMILY, setting=0.0, offline_agreement=1.0, policy=plans[0])
    return Measured(contender, None, _joined(scores), PairedCosts(mine_D, full_D))


def _plan(
    engine: AdaptiveEngine, tokens: Sequence[int], protocol: Protocol, exits: Sequence[int]
) -> PlannedExit:
    stack = engine.stack
    # Features are recorded and not read: any table of candidates will do.
    table_VK = np.zeros((stack.vocab, 2), np.int32)
    chunk = record_document(stack, "0" * 64, tokens, exits, table_VK)
    header = TraceHeader(
        model=engine.model_fingerprint,
        schema=CANDIDATES_V1.digest,
        exits=tuple(exits),
        layers=stack.layers,
    )
    return plan_of(TokenTraces.from_chunks(header, [chunk]), protocol.prompt_tokens)


def _joined(scores: Sequence[Scores]) -> Scores:
    depths: Counter[int] = Counter()
    for each in scores:
        depths.update(each.depths)
    sums = {f"{name}_D": np.concatenate([getattr(s, f"{name}_D") for s in scores]) for name in SUMS}
    return Scores(**sums, depths=dict(depths))
