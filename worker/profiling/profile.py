"""Measure what a token's parts cost on this machine, in the loop and by the size of a launch.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from offramp.controller.costs.prices import (
    COPY_PARTS,
    LEAST_REPEATS,
    PARTS,
    PROBE_PARTS,
    ROUTED,
    SPAN_PARTS,
    Batch,
)
from offramp.controller.costs.table import CostTable, view_of_one
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, SCHEMAS, IntArray
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.model.products import processor
from offramp.worker.profiling.joules import PartEnergy, metered
from offramp.worker.profiling.loop import PartClock, clocked, most_tokens
from offramp.worker.profiling.rounds import (
    COPY,
    REPEATS,
    ProfileConfig,
    Rounds,
    cycle_script,
    pass_table,
    whole_script,
)
from offramp.worker.profiling.samples import Key, Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a profile found.

    Attributes:
        costs: Table of what was measured.
        loose: Parts whose interval stayed wider than was asked for, or that have none.
        bare: Parts that have none: the time gave too few samples.
        rounds: Samples of each part, at most.
        seconds: Wall time that measuring took.
        setup_s: Wall time before it: what is packed, allocated and compiled once.
        enough_s: About the time in which every part gets an interval.
    """

    costs: CostTable
    loose: tuple[Key, ...]
    bare: tuple[Key, ...]
    rounds: int
    seconds: float
    setup_s: float
    enough_s: float


def measure_costs(
    engine: AdaptiveEngine,
    candidates_VK: IntArray,
    config: ProfileConfig | None = None,
    on_cell: Callable[[float, float], None] = lambda *_: None,
) -> Profile:
    """Profile an engine's model with its dtype, device, translators and torch's threads.

    Rounds go on until every interval is tight, or the time is up. It begins once all is set up, and
    is held but for the first round, in which every part gets a sample.

    Args:
        engine: Idle, in lock-step, with slots for all rows.
        candidates_VK: The candidate table whose probes are timed.
        config: Says how much is profiled.
        on_cell: Told (seconds so far, limit) after each part of a round.

    Raises:
        ConfigError: the context, rows or exits do not fit the engine.
    """
    config = _fitted(config or ProfileConfig(), engine)
    samples = Samples()
    begun = time.perf_counter()
    with clocked(engine) as clock, metered(engine, clock) as energy:
        rounds = Rounds(engine, clock, candidates_VK, config, samples)
        rounds.warm_up()
        start = time.perf_counter()

        def left_s() -> float:
            return config.limit_s - (time.perf_counter() - start)

        def tell() -> None:
            on_cell(config.limit_s - max(0.0, left_s()), config.limit_s)

        enough_s = LEAST_REPEATS * rounds.first(tell)
        # Longer runs of steps, if six of them fit: what disturbs one step of many is cut off.
        rounds.repeats = max(1, min(REPEATS, int(config.limit_s / enough_s)))
        number = 1
        while samples.loose(config.half_width) and rounds.run(number, left_s, tell):
            number += 1
        seconds = time.perf_counter() - start
    return Profile(
        costs=_table(engine, config, samples, energy, clock),
        loose=tuple(samples.loose(config.half_width)),
        bare=tuple(samples.bare()),
        rounds=number,
        seconds=seconds,
        setup_s=start - begun,
        enough_s=enough_s,
    )


def describe_machine(dtype: torch.dtype) -> str:
    """Processor, operating system, dtype and threads, on one line."""
    name = str(dtype).removeprefix("torch.")
    return f"{processor()}, {platform.system()}, {name}, {torch.get_num_threads()} threads"


def _table(
    engine: AdaptiveEngine,
    config: ProfileConfig,
    samples: Samples,
    energy: PartEnergy,
    clock: PartClock,
) -> CostTable:
    def batches(table: str, sizes: Sequence[int], parts: Sequence[str]) -> tuple[Batch, ...]:
        return tuple(
            Batch(
                size=size,
                parts={
                    part: energy.priced(table, part, samples.timing(Key(table, size, part)))
                    for part in parts
                },
            )
            for size in sizes
        )

    by_rows = batches("rows", config.rows, PARTS)
    return CostTable(
        **view_of_one(by_rows),
        layers=engine.stack.layers,
        machine=describe_machine(engine.stack.dtype),
        batches=by_rows,
        spans=batches("tokens", config.tokens, SPAN_PARTS),
        passes={
            rows: batches(pass_table(rows), config.pass_tokens, SPAN_PARTS)
            for rows in config.rows[1:]
        },
        probes={name: batches(name, config.rows, PROBE_PARTS) for name in _probes(config)},
        copies=_copies(engine, config, samples),
        schema=CANDIDATES_V1.name,
        model=engine.model_fingerprint,
        dtype=str(engine.stack.dtype).removeprefix("torch."),
        device=engine.stack.device.type,
        threads=torch.get_num_threads(),
        context=config.context,
        clock=clock.kind,
        created_at=time.time(),
        energy_method=energy.method,
        energy_source=energy.source,
    )


def _probes(config: ProfileConfig) -> list[str]:
    """Name what is probed: a drafter drafts only where a row may have several tokens."""
    return [*(schema.name for schema in SCHEMAS.values()), *([ROUTED] if config.tokens[1:] else [])]


def _copies(
    engine: AdaptiveEngine, config: ProfileConfig, samples: Samples
) -> dict[str, tuple[Batch, ...]]:
    """Layer and head of the copy that the engine keeps, if any; its joules are not told apart."""
    precision = engine.config.draft_precision
    if precision is None:
        return {}
    batches = (
        Batch(size=n, parts={part: samples.timing(Key(COPY, n, part)) for part in COPY_PARTS})
        for n in config.rows
    )
    return {precision.weights: tuple(batches)}


def _fitted(config: ProfileConfig, engine: AdaptiveEngine) -> ProfileConfig:
    stack = engine.stack
    exits = config.exits or tuple(sorted({max(1, stack.layers * n // 4) for n in (1, 2, 3)}))
    if list(exits) != sorted(set(exits)) or not all(1 <= e < stack.layers for e in exits):
        raise ConfigError(
            "exits", f"{exits} do not ascend within [1, {stack.layers - 1}]", "Name other layers"
        )
    if config.rows[-1] > engine.kv.slots:
        raise ConfigError(
            "rows", f"{config.rows[-1]} exceed the engine's {engine.kv.slots} slots", "Use fewer"
        )
    if engine.config.schedule.holds:
        raise ConfigError("holds", "make cohorts; parts are timed in lock-step", "Use none")
    if config.tokens[-1] > engine.config.max_pending + 1:
        raise ConfigError(
            "tokens",
            f"{config.tokens[-1]} are more than the {engine.config.max_pending} drafts that may be "
            "open, and one",
            "Use fewer, or an engine with a larger max_pending",
        )
    scripts = (whole_script(len(exits)), *map(cycle_script, config.tokens))
    longest = config.context + most_tokens(config.rows[-1], max(map(len, scripts)))
    if longest > stack.context:
        raise ConfigError(
            "context",
            f"{config.context} and what is decoded after it exceed the model's {stack.context}",
            f"Use at most {stack.context - longest + config.context}",
        )
    return replace(config, exits=exits)
