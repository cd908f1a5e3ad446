"""What one round of a profile runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from offramp.controller.costs.prices import SPAN_PARTS
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, SCHEMAS, IntArray
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.loop import (
    SILENT,
    STAY,
    PartClock,
    ScriptedPolicy,
    Step,
    decode_steps,
    span_pass,
)
from offramp.worker.profiling.samples import Samples, random_policy

REPEATS = 6
"""Steps of a kind in a round."""

PASSES = 3
"""Verifying passes of several rows in a round: there are many sizes, and large ones take long."""

PROMPT_TOKENS = 512
"""Distinct tokens of the invented prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """How much is profiled, and for how long.

    Attributes:
        rows: Rows of a launch to measure at, ascending from 1.
        tokens: Tokens of one row to measure at, ascending from 1 (verifying passes).
        context: Tokens in the cache before each round.
        exits: Layers to probe; () places three at the quarters of the depth.
        half_width: Go on until no interval is wider, relative to its median: ± this.
        limit_s: Stop then in any case.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: tuple[int, ...] = (1, 2, 3, 5, 7, 9)
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
    """One round runs every number of rows, schema and span once, in an order that rotates."""

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
        self.scripts = {
            schema.name: ScriptedPolicy(random_policy(schema, config.exits, candidates_VK))
            for schema in SCHEMAS.values()
        }
        rng = np.random.default_rng(0)
        alphabet = min(PROMPT_TOKENS, engine.stack.vocab)
        self.prompts = [
            rng.integers(alphabet, size=config.context).tolist() for _ in range(config.rows[-1])
        ]

    def warm_up(self) -> None:
        """Let the first calls pack, allocate and compile what only they do."""
        samples, self.samples = self.samples, Samples()
        self.run(0)
        self.samples = samples

    def run(self, number: int) -> None:
        """Run one round over all parts."""
        cells = list(self._cells())
        turn = number % len(cells)
        for cell in cells[turn:] + cells[:turn]:
            cell()

    def _cells(self) -> Iterator[Callable[[], None]]:
        for rows, name in itertools.product(self.config.rows, self.scripts):
            if name == CANDIDATES_V1.name:
                yield partial(self._whole, rows)
            else:
                yield partial(self._probe, rows, name)
        for tokens in self.config.tokens:
            yield partial(self._span, tokens)
        for rows, tokens in itertools.product(self.config.rows[1:], self.config.pass_tokens):
            yield partial(self._pass, rows, tokens)
        for rows in () if self.engine.decoder.context.copy is None else self.config.rows:
            yield partial(self._copy, rows)

    def _whole(self, rows: int) -> None:
        """Every part: steps that nobody is asked in, steps that stay, and pairs that leave."""
        exits = self.config.exits
        steps = self._decode(rows, CANDIDATES_V1.name, whole_script(len(exits)))
        silent, stays = steps[:REPEATS], steps[REPEATS : 2 * REPEATS]
        fills = steps[2 * REPEATS + 1 :: 2]
        full = silent + stays
        skipped = sum(self.engine.stack.layers - layer for layer in exits)
        self.samples.add(
            "rows",
            rows,
            {
                "layer": median(step.each("layer") for step in full),
                "head": median(step.each("head") for step in full),
                "step": median(step.rest_s for step in silent),
                "fill": sum(step.parts_s["fill"] for step in fills) / skipped,
                **self._asked(CANDIDATES_V1.name, rows, stays),
            },
        )

    def _probe(self, rows: int, name: str) -> None:
        self._asked(name, rows, self._decode(rows, name, [STAY] * REPEATS))

    def _asked(self, name: str, rows: int, stays: Sequence[Step]) -> dict[str, float]:
        parts = {part: median(step.each(part) for step in stays) for part in ("probe", "build")}
        parts["policy"] = median(step.each("ask") - step.each("probe") for step in stays)
        self.samples.add(name, rows, parts)
        return parts

    def _span(self, tokens: int) -> None:
        context = self.config.context
        passes = [span_pass(self.engine, self.clock, context, tokens) for _ in range(REPEATS)]
        parts = {part: median(each[part] for each in passes) for part in SPAN_PARTS}
        self.samples.add("tokens", tokens, parts)

    def _pass(self, rows: int, tokens: int) -> None:
        """A launch that verifies: several tokens of each row."""
        context = self.config.context
        passes = [span_pass(self.engine, self.clock, context, tokens, rows) for _ in range(PASSES)]
        parts = {part: median(each[part] for each in passes) for part in SPAN_PARTS}
        self.samples.add(pass_table(rows), tokens, parts)

    def _copy(self, rows: int) -> None:
        """A token of each row on the copy."""
        copy = self.engine.decoder.context.copy
        assert copy is not None
        size = (self.config.context, 1, rows)
        passes = [span_pass(self.engine, self.clock, *size, copy.stack) for _ in range(REPEATS)]
        parts = {part: median(each[part] for each in passes) for part in SPAN_PARTS}
        self.samples.add(COPY, rows, parts)

    def _decode(self, rows: int, name: str, acts: Sequence[int]) -> list[Step]:
        script = self.scripts[name]
        return decode_steps(self.engine, self.clock, script, self.prompts[:rows], acts)


COPY = "copy"
"""Name of the samples on the copy of the layers in fewer bytes."""


def pass_table(rows: int) -> str:
    """Name of the samples over several tokens of each of so many rows."""
    return f"tokens of {rows} rows"


def whole_script(exits: int) -> list[int]:
    """A round: steps unasked, asked and staying, and, for each exit, leaving and then filling."""
    leave_and_fill = [act for place in range(exits) for act in (place, SILENT)]
    return [SILENT] * REPEATS + [STAY] * REPEATS + leave_and_fill
