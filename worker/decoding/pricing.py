"""When rows that draft should be verified: by measured costs, and by what came of it lately."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

from offramp.controller.costs.pace import Drafting, Pacer, common_depth
from offramp.controller.costs.table import CostTable
from offramp.worker.decoding.sequence import Sequence

EXPECTED = 0.85
"""Share of drafts thought right where nothing is known yet."""

WEIGHT = 8.0
"""So many drafts, or launches, weigh as much as what was thought before."""

MEMORY = 0.998
"""What is known loses this factor a launch, so that what did not pay is tried again."""

REST = 16
"""Launches at full depth before it is asked again what did not pay."""

FIRST = 4
"""Launches at full depth at the very beginning, with which others are compared."""

MOST_DRAG = 4.0
"""A launch that took so many times as long as expected was held up by something else."""


@dataclass(slots=True)
class Record:
    """What came of a policy's drafts lately; old ones count for less.

    Attributes:
        agreed, judged: Drafts that full depth confirmed, and those that it was asked about.
        drafted, cycles: Drafts, and how many times rows were verified after some.
        depth: Layers executed for its last draft.
    """

    depth: int
    agreed: float = 0.0
    judged: float = 0.0
    drafted: float = 0.0
    cycles: float = 0.0

    def fade(self) -> None:
        """Forget a little."""
        self.agreed *= MEMORY
        self.judged *= MEMORY
        self.drafted *= MEMORY
        self.cycles *= MEMORY

    @property
    def acceptance(self) -> float:
        """Chance that a draft is right if those before it are."""
        return (self.agreed + WEIGHT * EXPECTED) / (self.judged + WEIGHT)

    @property
    def length(self) -> float | None:
        """Drafts of a cycle; None before there was one."""
        return self.drafted / self.cycles if self.cycles > 0.5 else None


@dataclass(slots=True)
class Drag:
    """How many times longer launches of a kind took than expected; old ones count for less."""

    launches: float = 0.0
    total: float = 0.0

    def add(self, ratio: float) -> None:
        """Take in a launch."""
        self.launches = MEMORY * self.launches + 1
        self.total = MEMORY * self.total + min(ratio, MOST_DRAG)

    @property
    def mean(self) -> float:
        """Their mean; 1 where nothing is known."""
        return (self.total + WEIGHT) / (self.launches + WEIGHT)


class DraftingPrice:
    """Decides for a priced schedule whether all rows go deep now.

    A row's drafts are expected to be right as often as its policy's were lately, until its own
    say otherwise. Costs are corrected by what launches really take: the table knows nothing of
    what a policy asks, or what else the machine does. Only rows in ``verify`` are kept from their
    exits, whose tokens are full depth's in any case; of other rows it decides at most when they go
    deep.

    Args:
        costs: What launches cost here.
        max_pending: Tokens of a row that may be pending.
    """

    def __init__(self, costs: CostTable, max_pending: int) -> None:
        self.pacer = Pacer(costs, max_pending)
        self._records: dict[int, Record] = {}
        # Of each row: drafts agreed on, judged, and pending, when it was last seen.
        self._seen: dict[Sequence, tuple[int, int, int]] = {}
        self._drafting, self._plain = Drag(), Drag()
        self._expected: tuple[Drag, float] | None = None
        self._rest = FIRST

    def __call__(self, begin: Rows[Sequence], waiting: Rows[Sequence]) -> bool:
        """Whether all rows go deep now: those that begin a token, and those that wait."""
        rows = [*begin, *waiting]
        if self._rest and not waiting:
            self._rest -= 1
            self._expect(rows, len(begin), True)
            return True
        self._learn(rows)
        drafting = [
            Drafting(len(row.drafts), record.depth, self._acceptance(row, record), record.length)
            for row in begin
            if row.request.kv_mode == "verify" and row.policy.exits and not row.policy_failed
            for record in [self._record(row)]
        ]
        drag = self._drafting.mean / self._plain.mean
        deep = self.pacer.goes_deep(drafting, len(rows), len(waiting), drag)
        self._expect(rows, len(begin), deep)
        if deep and not waiting and not any(row.drafts for row in begin):
            self._rest = REST
        return deep

    def took(self, seconds: float) -> None:
        """Learn how long the launch took that was last decided."""
        if self._expected is not None:
            drag, expected_s = self._expected
            drag.add(seconds / expected_s)
            self._expected = None

    def _expect(self, rows: list[Sequence], begin: int, deep: bool) -> None:
        """Say what the table expects of the launch that comes; of other modes it knows too little.

        A launch that lets ``begin`` rows draft may also take some of them to the end, where no
        other row waits: that is learned as what drafting costs.
        """
        if any(row.request.kv_mode != "verify" for row in rows):
            return
        depth = common_depth([self._record(row).depth for row in rows])
        drafts = max(len(row.drafts) for row in rows)
        if not deep:
            self._expected = (self._drafting, self.pacer.draft_s(begin, depth))
        else:
            drag = self._drafting if drafts else self._plain
            self._expected = (drag, self.pacer.verify_s(len(rows), depth, drafts))

    def _learn(self, rows: list[Sequence]) -> None:
        for record in self._records.values():
            record.fade()
        seen = {}
        for row in rows:
            agreed, judged, pending = self._seen.get(row, (0, 0, 0))
            if row.request.kv_mode == "verify" and row.policy.exits:
                record = self._record(row)
                record.agreed += row.agreed - agreed
                record.judged += row.judged - judged
                if row.drafts:
                    record.depth = row.drafts[-1].exit_layer
                elif pending:
                    record.drafted += pending
                    record.cycles += 1
            seen[row] = (row.agreed, row.judged, len(row.drafts))
        self._seen = seen  # made anew, so that rows that have ended are forgotten

    def _record(self, row: Sequence) -> Record:
        key = id(row.policy)
        if key not in self._records:
            self._forget()
            exits = row.policy.exits
            self._records[key] = Record(exits[0] if exits else self.pacer.costs.layers)
        return self._records[key]

    def _forget(self) -> None:
        """Drop what is known of policies that no row has had for long."""
        used = {id(row.policy) for row in self._seen}
        self._records = {
            key: record
            for key, record in self._records.items()
            if key in used or record.judged > 1e-2
        }

    def _acceptance(self, row: Sequence, record: Record) -> float:
        return (row.agreed + WEIGHT * record.acceptance) / (row.judged + WEIGHT)
