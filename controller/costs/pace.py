"""What a cost table says of rows that draft and verify together: how long to draft, if at all.

A cycle of n rows is k launches that draft, each through e of the L layers, and one that verifies:
n rows of one token through e layers, and n rows of k + 1 tokens through the other L - e. Of the
drafts of a row, each right with probability a if those before it are, (1 - a^(k+1)) / (1 - a)
tokens become certain (Leviathan et al. 2023, equation 1). Without drafts it is full depth. Drafts
on a copy of the layers in fewer bytes cost the copy's layers, and are verified from the first on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

from offramp.controller.costs.prices import SPAN_PARTS, Prices, read_prices
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import is_on_copy, weights_of

FREE_GROWTH = 1.25
"""A layer that takes at most so many times one row's time counts as not grown."""

LEAST_GAIN = 1.03
"""Drafting must promise so many times full depth's rate: prices are never quite right."""


def knee_of(costs: CostTable) -> int:
    """Most rows that were measured whose layer takes hardly more than one row's.

    Up to it a launch costs the same whoever takes part, so launches count; above it each row
    costs, so rows do. The growth that is let pass is ``FREE_GROWTH``.
    """
    most = FREE_GROWTH * costs.layer_s
    flat = takewhile(lambda each: each.parts["layer"].median_s <= most, costs.batches)
    return max((each.size for each in flat), default=1)


def verifying_prices(costs: CostTable, rows: float, tokens: float) -> Prices:
    """Prices of a launch of several tokens of each of some rows; layer, head, step are of all.

    Between measured numbers of rows and of tokens they are interpolated linearly.

    Raises:
        ConfigError: outside of what was measured, in rows or in tokens.
    """
    prices = costs.at(rows)
    if not costs.batches:
        return replace(prices, tokens=tokens)
    measured = {1: costs.spans, **costs.passes}
    sizes = sorted(size for size, spans in measured.items() if spans)
    ends = [size for size in sizes if size <= rows][-1:] + [s for s in sizes if s >= rows][:1]
    if len(ends) < 2:
        raise ConfigError(
            "passes",
            f"over several tokens of {rows:g} rows were not profiled",
            "Run `offramp profile` with larger --rows",
        )
    low, high = (read_prices("tokens", measured[size], tokens) for size in ends)
    share = (rows - ends[0]) / (ends[1] - ends[0]) if ends[0] < ends[1] else 0.0
    layer_s, head_s, step_s = (
        low[f"{part}_s"] + share * (high[f"{part}_s"] - low[f"{part}_s"]) for part in SPAN_PARTS
    )
    return replace(prices, tokens=tokens, layer_s=layer_s, head_s=head_s, step_s=step_s)


@dataclass(frozen=True, slots=True)
class Drafting:
    """A row that may draft.

    Attributes:
        pending: Its drafts that wait for confirmation.
        depth: Layers executed for a draft; an ``Exit`` if they are a copy's.
        acceptance: Chance that a draft is right if those before it are.
        length: Most drafts that its policy makes before it is verified; None: not known yet.
    """

    pending: int
    depth: int
    acceptance: float
    length: float | None = None


@dataclass(frozen=True, slots=True)
class Cycle:
    """How many drafts a row should make before it is verified, and what that earns.

    Attributes:
        length: Drafts of each row; 0 is full depth: no exits at all.
        rate: Certain tokens per second, all rows together.
    """

    length: int
    rate: float


def common_depth(depths: Sequence[int]) -> int:
    """What stands for the exits of several rows: the mean, or, with a copy, the most frequent.

    >>> from offramp.controller.policies.exits import Exit
    >>> common_depth([3, 6, 6]), common_depth([Exit(12, "int4"), 6, Exit(12, "int4")])
    (5, 12:int4)
    """
    if any(map(is_on_copy, depths)):
        return Counter(depths).most_common(1)[0][0]
    return round(sum(depths) / len(depths))


class Pacer:
    """Prices drafting against verifying, launch by launch.

    Args:
        costs: What launches cost on this machine.
        most: Drafts of a row that may be pending.
    """

    def __init__(self, costs: CostTable, most: int) -> None:
        self.costs = costs
        longest = max((batch.size for batch in costs.spans), default=most + 1)
        self.most = min(most, longest - 1)
        # Interpolating takes a tenth of a millisecond, and a launch asks for dozens of prices.
        self.draft_s = lru_cache(maxsize=4096)(self._draft_s)
        self._verify_s = lru_cache(maxsize=4096)(self._verifying_s)
        self._best = lru_cache(maxsize=4096)(self._find_best)

    def verify_s(self, rows: int, depth: int, drafts: int) -> float:
        """Seconds of a launch that takes rows, each with so many drafts of a depth, to the end.

        More drafts than were measured count as the most that were.
        """
        return self._verify_s(rows, depth, min(drafts, self.most))

    def _draft_s(self, rows: int, depth: int) -> float:
        """Seconds of a launch in which so many rows draft after so many layers."""
        is_own = not is_on_copy(depth)
        prices = self.costs.at(rows) if is_own else self.costs.on_copy(weights_of(depth), rows)
        return prices.step_s + depth * prices.layer_s + prices.head_s

    def _verifying_s(self, rows: int, depth: int, drafts: int) -> float:
        one = self.costs.at(rows)
        if drafts == 0:
            return one.full_s
        prices = verifying_prices(self.costs, rows, drafts + 1)
        depth = 0 if is_on_copy(depth) else depth
        deep = (one.layers - depth) * prices.layer_s
        return prices.step_s + depth * one.layer_s + deep + prices.head_s

    def best(
        self,
        rows: int,
        depth: int,
        acceptance: float,
        *,
        longest: float | None = None,
        drag: float = 1.0,
    ) -> Cycle:
        """The cycle of the highest rate, among those of 0 to ``most`` drafts.

        Args:
            rows: Rows that draft and are verified together.
            depth: Layers executed for a draft.
            acceptance: Chance that a draft is right if those before it are.
            longest: Drafts that the rows' policies make at most; None: ``most``.
            drag: Seconds of a launch that drafts or verifies, over what the table says, in units
                of the same ratio of full depth's launches.
        """
        length = self.most if longest is None else max(1, min(self.most, round(longest)))
        return self._best(rows, depth, round(acceptance, 2), length, round(drag, 1))

    def goes_deep(
        self, drafting: Sequence[Drafting], rows: int, waiting: int, drag: float = 1.0
    ) -> bool:
        """Whether all rows should now go to the end, and no row draft on.

        Where exits pay nothing, always. Else a row's policy says how long it drafts; rows that
        wait meanwhile are worth waiting for while what the others' drafts promise, in tokens per
        second of the launch that it takes, exceeds the rate of the best cycle (the rule of
        one-step look-ahead).

        Args:
            drafting: The rows that may draft now.
            rows: All rows, those that draft and that wait included.
            waiting: Rows that wait to be verified.
            drag: See ``best``.
        """
        if not drafting:
            return True
        depth = common_depth([row.depth for row in drafting])
        acceptance = sum(row.acceptance for row in drafting) / len(drafting)
        known = [row.length for row in drafting if row.length is not None]
        longest = sum(known) / len(known) if known else None
        best = self.best(rows, depth, acceptance, longest=longest, drag=drag)
        if best.length == 0:
            return True
        if not waiting:
            return False
        gain = sum(row.acceptance ** (row.pending + 1) for row in drafting)
        return gain < best.rate * drag * self.draft_s(rows - waiting, depth)

    def _find_best(
        self, rows: int, depth: int, acceptance: float, longest: int, drag: float
    ) -> Cycle:
        full = rows / self.verify_s(rows, depth, 0)
        best = Cycle(0, full)
        tokens, seconds, chance = 1.0, 0.0, 1.0
        for length in range(1, longest + 1):
            chance *= acceptance
            tokens += chance
            seconds += self.draft_s(rows, depth)
            rate = rows * tokens / (drag * (seconds + self.verify_s(rows, depth, length)))
            if rate > max(best.rate, LEAST_GAIN * full):
                best = Cycle(length, rate)
        return best
