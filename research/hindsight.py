"""The hindsight oracle, decoded: each token leaves at the first exit that agrees with full depth.

No policy can do this: the labels come from a full-depth pass over the same document. Even so it
need not agree everywhere, for its exits change the cache that later tokens attend to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.agents.evaluation.measure import (
    HeldOut,
    Protocol,
    Split,
    measure_quality,
    timed_document,
)
from offramp.agents.evaluation.rows import Clock, Measured
from offramp.agents.evaluation.scores import Scores
from offramp.agents.placing.contenders import Contender
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.exit_plan import PlannedExit
from offramp.research.fitting.oracle import first_agreeing
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.recording.recorder import record_document

FAMILY = "hindsight oracle"


def measure_oracle(
    engine: AdaptiveEngine,
    split: Split,
    protocol: Protocol,
    exits: Sequence[int],
    timed_documents: int,
) -> Measured:
    """Teacher-forced tokens of every document and the time of the first few; no lines, no probes.

    Args:
        engine: Idle.
        split: Test documents.
        protocol: How much of each is decoded.
        exits: Layers it may leave after.
        timed_documents: How many are timed.
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
    return Measured(contender, None, _joined(scores), Clock(mine_D, full_D))


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
    first_T = first_agreeing(TokenTraces.from_chunks(header, [chunk]))
    # Step 0 is the token that the prompt's pass emits.
    return PlannedExit(exits=tuple(exits), plan_T=first_T[protocol.prompt_tokens - 1 :])


def _joined(scores: Sequence[Scores]) -> Scores:
    plain = [each.plain() for each in scores]
    depths: dict[str, int] = {}
    for each in plain:
        for layer, count in each.pop("depths").items():
            depths[layer] = depths.get(layer, 0) + count
    sums = {name: [value for each in plain for value in each[name]] for name in plain[0]}
    return Scores.of({**sums, "depths": depths})
