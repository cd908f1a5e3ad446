"""The published drafting rules at their best settings, by replay on validation documents.

Shape suffixes: N tokens, E exits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from offramp.agents.drafting.draft_replay import Chosen, at_exits, bounds, ranked
from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.controller.policies.drafts import ConfidentDraft, DelDraft, StaticDraft, ThompsonDraft
from offramp.controller.policies.exits import is_on_copy, weights_of
from offramp.controller.policies.protocols import RoutingPolicy
from offramp.controller.traces import TraceHeader
from offramp.envs.cores.draft_core import DraftExitCore
from offramp.envs.traces.tokens import TokenTraces


def static_grid(
    validation: TokenTraces,
    costs: CostTable,
    candidates_VK: IntArray | None = None,
    max_pending: int = MAX_PENDING,
) -> list[Chosen]:
    """Every (exit, length), the best first; headless if a table is given.

    Without the head, what is drafted has to be probed: a confidence stop that never stops.
    """
    name = "static" if candidates_VK is None else "headless static"

    def rule(layer: int, length: int) -> RoutingPolicy:
        if candidates_VK is None:
            return StaticDraft(layer=layer, length=length, max_pending=max_pending)
        return ConfidentDraft(
            layer=layer,
            threshold=0.0,
            length=length,
            max_pending=max_pending,
            candidates_VK=candidates_VK,
        )

    tried = [
        (f"{name}, exit {layer}, length {length}", rule(layer, length))
        for layer in validation.header.exits
        for length in range(1, max_pending + 1)
    ]
    return ranked(tried, validation, costs, max_pending)


def thompson_grid(
    validation: TokenTraces, costs: CostTable, max_pending: int = MAX_PENDING
) -> list[Chosen]:
    """Thompson sampling at every exit and with several bounds on its length, the best first."""
    tried = [
        (
            f"Thompson sampling, exit {layer}, at most {length}",
            ThompsonDraft(layer, length=length, max_pending=max_pending),
        )
        for layer in validation.header.exits
        for length in bounds(max_pending)
    ]
    return ranked(tried, validation, costs, max_pending)


def del_rule(
    train: TokenTraces, validation: TokenTraces, costs: CostTable, max_pending: int = MAX_PENDING
) -> list[Chosen]:
    """DEL over all recorded exits, and over the trained ones, the best first."""
    exits = train.header.exits
    load = dict(zip(exits, loads_of(train.header, costs), strict=True))
    tried = []
    for subset in {exits, exits[-1:], tuple(layer for layer in exits if layer % 3 == 0) or exits}:
        shown = at_exits(train, subset)
        policy = DelDraft(
            subset,
            train.header.layers,
            shown.agree_NE.mean(0),
            halfway_confidence(shown),
            [load[layer] for layer in subset],
            max_pending=max_pending,
        )
        tried.append((f"DEL, exits {', '.join(map(str, subset))}", policy))
    return ranked(tried, validation, costs, max_pending)


def loads_of(header: TraceHeader, costs: CostTable) -> list[float]:
    """What a draft of each exit costs in layers of the model's own, as measured.

    Raises:
        ConfigError: the layers of a copy that some exit is on were not measured.
    """

    def load(layer: int) -> float:
        if is_on_copy(layer):
            return layer * costs.on_copy(weights_of(layer)).layer_s / costs.layer_s
        return float(layer + sum(before <= layer for before in header.adapters))

    return [load(layer) for layer in header.exits]


def halfway_confidence(traces: TokenTraces) -> NDArray[np.float64]:
    """Halfway between the mean top-1 of right and of wrong tokens, by exit (DEL's threshold)."""
    right_NE = traces.agree_NE > 0
    top1_NE = traces.softmax_NES[:, :, 0].astype(np.float64)
    middle = []
    for exit_index in range(right_NE.shape[1]):
        top1_N, right_N = top1_NE[:, exit_index], right_NE[:, exit_index]
        means = [top1_N[kind_N].mean() for kind_N in (right_N, ~right_N) if kind_N.any()]
        middle.append(float(np.mean(means)))
    return np.asarray(middle)


def hindsight(traces: TokenTraces, costs: CostTable) -> float:
    """Speed-up of one who knows which exits are right: never a wrong draft, never a probe too many.

    It leaves at the first right exit, or verifies unasked; it still pays one probe per draft.
    """
    core = DraftExitCore(traces, costs, num_envs=len(traces.documents), autoreset=False)
    core.reset(tokens=np.flatnonzero(np.diff(traces.document_N, prepend=-1)))
    exits = core.exits
    ended = False
    while not ended:
        standing = [core.standing(place)[:2] for place in range(core.num_envs)]
        token_B = np.minimum([token for token, _ in standing], len(traces) - 1)
        here_B = np.array([here for _, here in standing])
        right_BE = core.tables.right_NE[token_B]
        first_B = np.where(right_BE.any(1), right_BE.argmax(1), exits)
        step = core.step(np.where(here_B < 0, first_B, 0))
        ended = bool(step.terminated_B.all())
    info = step.finals.info
    return float(info["tokens"].sum() / info["seconds"].sum() * core.prices.full_s)
