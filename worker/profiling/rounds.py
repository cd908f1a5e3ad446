"""What one round of a profile runs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from offramp.controller.costs.prices import COPY_PARTS, LEAST_REPEATS, ROUTED
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, MAX_PENDING, SCHEMAS, IntArray
from offramp.controller.policies.exits import Exit
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.loop import (
    SILENT,
    STAY,
    PartClock,
    ScriptedPolicy,
    Step,
    decode_steps,
)
from offramp.worker.profiling.samples import Samples, eager_drafter, random_policy

REPEATS = 6
"""Steps of a kind in a round at most; fewer where six rounds of so many would not fit."""

PASSES = 3
"""Cycles of several rows in a round: there are many sizes, and large ones take long."""

COPY_CYCLE = 9
"""Tokens at most of a cycle that drafts on the copy: one that is used again and again stays in the
caches, so that a first draft is dearer than those behind it."""

CYCLE_TOKENS = 64
"""Tokens that the cycles of a round draft or verify, if one cycle has not more: a longer text would
be another context."""

PROBE_CONTEXT = 16
"""Tokens in the cache where only asking is timed, which reads none of them."""

PROMPT_TOKENS = 512
"""Distinct tokens of the invented prompts."""


def spans_of(max_pending: int) -> tuple[int, ...]:
    """Tokens of one row to measure verifying passes at, where so many drafts may be open.

    >>> spans_of(8), spans_of(24)
    ((1, 2, 3, 5, 7, 9), (1, 2, 3, 5, 7, 9, 13, 17, 25))
    """
    usual = (1, 2, 3, 5, 7, 9, 13, 17, 25, 33, 49, 65)
    return (*(tokens for tokens in usual if tokens <= max_pending), max_pending + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """How much is profiled, and for how long.

    Attributes:
        rows: Rows of a launch to measure at, ascending from 1.
        tokens: Tokens of one row to measure at, ascending from 1 (verifying passes).
        context: Tokens in the cache before each round.
        exits: Layers to probe; () places three at the quarters of the depth.
        half_width: Go on until no interval is wider, relative to its median: ± this.
        limit_s: Stop then in any case, once every part has a sample. Setting up is not counted.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: tuple[int, ...] = spans_of(MAX_PENDING)
    context: int = 128
    exits: tuple[int, ...] = ()
    half_width: float = 0.05
    limit_s: float = 300.0

    @property
    def pass_tokens(self) -> tuple[int, ...]:
        """Tokens of each row to measure several rows at: the first, the middle, the last."""
        return tuple(sorted({1, self.tokens[len(self.tokens) // 2], self.tokens[-1]}))

    def __post_init__(self) -> None:
        for name in ("rows", "tokens"):
            sizes = getattr(self, name)
            if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
                raise ConfigError(name, f"{sizes} do not ascend from 1", "Write them like 1,2,4")
        if self.context < 1:
            raise ConfigError("context", f"{self.context} is below 1")
        if not 0 < self.half_width < 1:
            raise ConfigError("half_width", f"{self.half_width} is not in (0, 1)")
        if not self.limit_s >= 0:
            raise ConfigError("limit_s", f"{self.limit_s} is no number of seconds")


class Rounds:
    """One round runs every number of rows, schema and span once, in an order that rotates.

    Where the time left does not suffice for an interval of every part, rounds leave the largest
    sizes out: six samples of some say more than three of all.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        clock: PartClock,
        candidates_VK: IntArray,
        config: ProfileConfig,
        samples: Samples,
    ) -> None:
        self.engine, self.clock = engine, clock
        self.config, self.samples = config, samples
        self.repeats = 1
        self._silent_s: dict[int, float] = {}  # by rows: the rest of a step that asks nobody
        self._books_s: dict[int, float] = {}  # and what it takes longer where rows are asked
        self.scripts = {
            schema.name: ScriptedPolicy(random_policy(schema, config.exits, candidates_VK))
            for schema in SCHEMAS.values()
        }
        self.drafter = ScriptedPolicy(
            eager_drafter(config.exits, candidates_VK, engine.config.max_pending)
        )
        rng = np.random.default_rng(0)
        alphabet = min(PROMPT_TOKENS, engine.stack.vocab)
        self.prompts = [
            rng.integers(alphabet, size=config.context).tolist() for _ in range(config.rows[-1])
        ]
        self.cells, self.rows = zip(*self._cells(), strict=True)
        self.took_s = [0.0] * len(self.cells)
        self.runs = [0] * len(self.cells)

    def warm_up(self) -> None:
        """Let the first calls pack, allocate and compile what only they do."""
        samples, self.samples = self.samples, Samples()
        for cell in self.cells:
            cell()
        self.samples = samples

    def first(self, on_cell: Callable[[], None] = lambda: None) -> float:
        """Sample every part once, each from one step; the seconds that this took."""
        for index in range(len(self.cells)):
            self._run(index)
            on_cell()
        return sum(self.took_s)

    def run(
        self, number: int, left_s: Callable[[], float], on_cell: Callable[[], None] = lambda: None
    ) -> bool:
        """Run a further round over what fits into the time left; whether anything did."""
        turn = number % len(self.cells)
        fits, ran = self._fitting(left_s()), False
        for index in [*range(turn, len(self.cells)), *range(turn)]:
            if index in fits and self.took_s[index] < left_s():
                self._run(index)
                on_cell()
                ran = True
        return ran

    def _run(self, index: int) -> None:
        start = time.perf_counter()
        self.cells[index]()
        self.took_s[index] = time.perf_counter() - start
        self.runs[index] += 1

    def _fitting(self, left_s: float) -> set[int]:
        """The cells, those of fewest rows first, of which intervals fit into the time left."""
        fits: set[int] = set()
        for index in sorted(range(len(self.cells)), key=self.rows.__getitem__):
            needed_s = self.took_s[index] * max(1, LEAST_REPEATS - self.runs[index])
            if needed_s <= left_s:
                fits.add(index)
                left_s -= needed_s
        return fits

    def _cells(self) -> Iterator[tuple[Callable[[], None], int]]:
        """What a round runs, each with the rows that it runs."""
        for rows, name in itertools.product(self.config.rows, self.scripts):
            if name == CANDIDATES_V1.name:
                yield partial(self._whole, rows), rows
            else:
                yield partial(self._probe, rows, name), rows
        for tokens in self.config.tokens:
            yield partial(self._cycles, 1, tokens), 1
        for rows, tokens in itertools.product(self.config.rows[1:], self.config.pass_tokens):
            yield partial(self._cycles, rows, tokens), rows
        precision = self.engine.config.draft_precision
        if precision is not None:
            last = (Exit(self.engine.stack.layers, precision.weights),)
            drafter = ScriptedPolicy(eager_drafter(last, None, self.engine.config.max_pending))
            for rows in self.config.rows:
                yield partial(self._copy, rows, drafter), rows

    def _whole(self, rows: int) -> None:
        """Every part: steps that nobody is asked in, steps that stay, and pairs that leave."""
        exits = self.config.exits
        repeats, script = self.repeats, whole_script(len(exits), self.repeats)
        steps = self._decode(rows, CANDIDATES_V1.name, script, self.config.context)
        silent, stays = steps[:repeats], steps[repeats : 2 * repeats]
        fills = steps[2 * repeats + 1 :: 2]
        full = silent + stays
        rests_s = [median(step.rest_s for step in some) for some in (silent, stays)]
        # Rows that nobody asks need no books: what these cost is paid by who asks.
        self._silent_s[rows], self._books_s[rows] = rests_s[0], max(0.0, rests_s[1] - rests_s[0])
        skipped = sum(self.engine.stack.layers - layer for layer in exits)
        self.samples.add(
            "rows",
            rows,
            {
                "layer": median(step.each("layer") for step in full),
                "head": median(step.each("head") for step in full),
                "step": rests_s[0],
                "fill": sum(step.parts_s["fill"] for step in fills) / skipped,
                **self._asked(CANDIDATES_V1.name, rows, stays),
            },
        )

    def _probe(self, rows: int, name: str) -> None:
        self._asked(name, rows, self._decode(rows, name, [STAY] * self.repeats, PROBE_CONTEXT))

    def _asked(self, name: str, rows: int, stays: Sequence[Step]) -> dict[str, float]:
        parts = {part: median(step.each(part) for step in stays) for part in ("probe", "build")}
        parts["build"] += self._books_s.get(rows, 0.0)
        parts["policy"] = median(step.each("ask") - step.each("probe") for step in stays)
        self.samples.add(name, rows, parts)
        return parts

    def _cycles(self, rows: int, tokens: int) -> None:
        """Launches that draft, each row's tokens but one, and then one that verifies them all."""
        most = self.repeats if rows == 1 else min(self.repeats, PASSES)
        script = cycle_script(tokens, most)
        prompts = [each[: self.config.context] for each in self.prompts[:rows]]
        steps = decode_steps(self.engine, self.clock, self.drafter, prompts, script, "verify")
        drafts, deep = ([step for step, act in zip(steps, script, strict=True) if act == kind]
                        for kind in (DRAFT, SILENT))  # fmt: skip
        part = "layer" if tokens == 1 else "span"
        parts = {
            "layer": median(step.each(part) for step in deep),
            "head": median(step.each("head") for step in deep),
            "step": median(step.rest_s for step in deep),
        }
        self.samples.add("tokens" if rows == 1 else pass_table(rows), tokens, parts)
        if drafts:
            self.samples.add(ROUTED, rows, self._routed(rows, drafts))

    def _routed(self, rows: int, drafts: Sequence[Step]) -> dict[str, float]:
        probe_s, build_s = (
            median(step.each(part) for step in drafts) for part in ("probe", "build")
        )
        policy_s = median(step.each("ask") - step.each("probe") for step in drafts)
        books_s = median(step.rest_s for step in drafts) - self._silent_s.get(rows, 0.0)
        # Where to ask first is decided while rows are made ready, and is charged as a decision.
        build_s = max(0.0, build_s + books_s - policy_s)
        return {"probe": probe_s, "policy": policy_s, "build": build_s}

    def _copy(self, rows: int, drafter: ScriptedPolicy) -> None:
        """Tokens of each row that are drafted on the copy, in cycles."""
        longest = min(COPY_CYCLE, self.engine.config.max_pending + 1)
        script = cycle_script(longest, min(self.repeats, PASSES))
        prompts = [each[: self.config.context] for each in self.prompts[:rows]]
        steps = decode_steps(self.engine, self.clock, drafter, prompts, script, "verify")
        drafts = [step for step, act in zip(steps, script, strict=True) if act == DRAFT]
        parts = {part: median(step.each(part) for step in drafts) for part in COPY_PARTS}
        self.samples.add(COPY, rows, parts)

    def _decode(self, rows: int, name: str, acts: Sequence[int], context: int) -> list[Step]:
        script, prompts = self.scripts[name], [each[:context] for each in self.prompts[:rows]]
        return decode_steps(self.engine, self.clock, script, prompts, acts)


COPY = "copy"
"""Name of the samples on the copy of the layers in fewer bytes."""


def pass_table(rows: int) -> str:
    """Name of the samples over several tokens of each of so many rows."""
    return f"tokens of {rows} rows"


DRAFT = 0
"""What the drafter does in a step that drafts: each row leaves at the first exit."""


def cycle_script(tokens: int, repeats: int = REPEATS) -> list[int]:
    """Some cycles: steps that draft all tokens of a row but one, and one that verifies.

    >>> cycle_script(3, 2)
    [0, 0, -2, 0, 0, -2]
    """
    cycles = max(1, min(repeats, CYCLE_TOKENS // tokens))
    return ([DRAFT] * (tokens - 1) + [SILENT]) * cycles


def whole_script(exits: int, repeats: int = REPEATS) -> list[int]:
    """A round: steps unasked, asked and staying, and, for each exit, leaving and then filling."""
    leave_and_fill = [act for place in range(exits) for act in (place, SILENT)]
    return [SILENT] * repeats + [STAY] * repeats + leave_and_fill
