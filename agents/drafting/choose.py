"""Which drafting policy of each family to run: by replay on validation documents.

Shape suffixes: N tokens, E exits, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.agents.drafting.draft_replay import DraftReplay, replay_drafts
from offramp.controller.costs.table import CostTable
from offramp.controller.features import IntArray
from offramp.controller.policies.drafts import ConfidentDraft
from offramp.controller.policies.protocols import RoutingPolicy
from offramp.envs.traces.tokens import TokenTraces

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


def confident_grid(
    validation: TokenTraces, costs: CostTable, candidates_VK: IntArray | None = None
) -> list[Chosen]:
    """Every (exit, η) of Kangaroo's rule, the best first; headless if a table is given."""
    name = "confidence stop" if candidates_VK is None else "headless confidence stop"
    tried = [
        (
            f"{name}, exit {layer}, η {eta:g}",
            ConfidentDraft(layer=layer, threshold=eta, candidates_VK=candidates_VK),
        )
        for layer in validation.header.exits
        for eta in THRESHOLDS
    ]
    return ranked(tried, validation, costs)


def ranked(
    tried: Sequence[tuple[str, RoutingPolicy]], validation: TokenTraces, costs: CostTable
) -> list[Chosen]:
    """The policies tried, the fastest on validation documents first."""
    found = [
        Chosen(name, policy, replay_drafts(policy, validation, costs)) for name, policy in tried
    ]
    return sorted(found, key=lambda each: -each.offline.rate)
