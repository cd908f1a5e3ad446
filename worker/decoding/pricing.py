"""When rows that draft should be verified: by measured costs, and by how often drafts are right."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from offramp.controller.costs.pace import Drafting, Pacer
from offramp.controller.costs.table import CostTable
from offramp.worker.decoding.sequence import Sequence

EXPECTED = 0.85
"""Share of drafts thought right where nothing is known yet."""

WEIGHT = 8.0
"""So many drafts weigh as much as what was thought before: of a policy, and of a row."""

MEMORY = 0.99
"""What is known of a policy's drafts loses this factor a launch, so that it is tried again."""


class DraftingPrice:
    """Decides for a priced schedule whether all rows go deep now.

    A row's drafts are expected to be right as often as its policy's were lately, until its own
    say otherwise. Only rows in ``verify`` are kept from their exits by it, whose tokens are full
    depth's in any case; of other rows it decides at most when they go deep.

    Args:
        costs: What launches cost here.
        max_pending: Tokens of a row that may be pending.
    """

    def __init__(self, costs: CostTable, max_pending: int) -> None:
        self.pacer = Pacer(costs, max_pending)
        self._known: dict[int, list[float]] = {}
        self._counted: dict[Sequence, tuple[int, int]] = {}
        self._depths: dict[int, int] = {}

    def __call__(self, begin: Rows[Sequence], waiting: Rows[Sequence]) -> bool:
        """Whether all rows go deep now: those that begin a token, and those that wait."""
        self._learn((*begin, *waiting))
        drafting = [
            Drafting(len(row.drafts), self._depth(row), self._acceptance(row))
            for row in begin
            if row.request.kv_mode == "verify" and row.policy.exits and not row.policy_failed
        ]
        return self.pacer.goes_deep(drafting, len(begin) + len(waiting), len(waiting))

    def _learn(self, rows: Rows[Sequence]) -> None:
        for known in self._known.values():
            known[0] *= MEMORY
            known[1] *= MEMORY
        counted = {}
        for row in rows:
            agreed, judged = self._counted.get(row, (0, 0))
            if row.judged > judged and row.request.kv_mode == "verify":
                known = self._known.setdefault(id(row.policy), [0.0, 0.0])
                known[0] += row.agreed - agreed
                known[1] += row.judged - judged
            counted[row] = (row.agreed, row.judged)
            if row.drafts:
                self._depths[id(row.policy)] = row.drafts[-1].exit_layer
        self._counted = counted  # made anew, so that rows that have ended are forgotten
        self._known = {key: known for key, known in self._known.items() if known[1] > 1e-3}

    def _depth(self, row: Sequence) -> int:
        return self._depths.get(id(row.policy), row.policy.exits[0])

    def _acceptance(self, row: Sequence) -> float:
        agreed, judged = self._known.get(id(row.policy), (0.0, 0.0))
        expected = (agreed + WEIGHT * EXPECTED) / (judged + WEIGHT)
        return (row.agreed + WEIGHT * expected) / (row.judged + WEIGHT)
