"""What the decoding benchmark lets run against each other.

Full depth, exits at scripted depths, a policy that asks and never leaves, drafts by schedule; on a
GPU full depth without CUDA graphs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np

from offramp.agents.drafting.likely_exits import likely_exits
from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.worker import AdaptiveEngine, KVMode
from offramp.worker.decoding.schedule import Schedule
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.loading import load_tokenizer
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig
from offramp.worker.profiling.samples import random_policy
from shared.workload import ScriptedExit, exit_layer

LAUNCHED = "kernel by kernel"
"""Full depth without CUDA graphs, and the schedule that its engine is found under."""

NEVER = "without drafts"
"""What the engine of full depth is found under, where others draft."""

STATIC = ((3, 2), (6, 3))
"""Exits and lengths of the reference model's static drafts."""

PROFILE_S = 15.0
"""Seconds of profiling for the priced schedule."""

SPREAD = 61
"""Tokens between a row's candidates, so that they lie all over the head."""


@dataclass
class Competitor:
    """One engine setting."""

    name: str
    kv_mode: KVMode | None = None
    schedule: str | None = None
    policy: Callable[[], Policy] = NeverExit
    exit_share: float | None = None


def contenders(
    batch: int, layers: int, vocab: int, depths: list[float], learned: Any, wanted: tuple[str, ...]
) -> list[Competitor]:
    found = [Competitor("HF generate"), Competitor("full depth", "project", "lock-step")]
    only_if_asked_for = (Competitor("HF static"), Competitor(LAUNCHED, "project", LAUNCHED))
    names = tuple(name for name in wanted if name)
    found += [each for each in only_if_asked_for if each.name.startswith(names)]
    at = exit_layer(layers)
    if batch == 1:
        tried = (3, 6, 9) if learned is not None else (at,)
        found[1:1] = [Competitor(f"HF assistant_early_exit={layer}") for layer in tried]
    for depth in depths:
        share = (1 - depth) / (1 - at / layers)
        for schedule in ("lock-step", "cohorts") if batch > 1 else ("lock-step",):
            for mode in get_args(KVMode):
                scripted = partial(ScriptedExit, (at,), share)
                found.append(Competitor(f"exits {depth:.0%}", mode, schedule, scripted, share))
    exits = tuple(sorted({max(1, layers * n // 4) for n in (1, 2, 3)}))
    rng = np.random.default_rng(0)
    start_V1 = rng.integers(0, vocab, (vocab, 1))
    table_VK = ((start_V1 + SPREAD * np.arange(64)) % vocab).astype(np.int32)
    asking = random_policy(CANDIDATES_V1, exits, table_VK)
    asking.threshold = float("inf")
    found.append(Competitor("3 probes, no exit", "project", "lock-step", lambda: asking))
    if learned is not None:
        found += [Competitor("learned", mode, "lock-step", lambda: learned)
                  for mode in get_args(KVMode)]  # fmt: skip
    baselines = ("HF generate", "full depth")  # what all others are divided by
    return [each for each in found if each.name in baselines or each.name.startswith(wanted)]


def drafted_at(model: Any, shape: str) -> Sequence[tuple[int, int]]:
    """Exits and lengths of static drafts: of the reference model the best by the cost table
    (docs/decoding.md), of another where they are likeliest to pay.
    """
    if shape == "reference":
        return STATIC
    exits = likely_exits(AdaptiveEngine(model, load_tokenizer(shape), slots=1))
    ranked = sorted(exits, key=lambda each: -each.rate)[: len(STATIC)]
    return [(each.layer, 2) for each in ranked]


def drafters(static: Sequence[tuple[int, int]], wanted: tuple[str, ...]) -> list[Competitor]:
    """Full depth, itself again as a control, and drafts of a fixed exit and length, by schedule.

    Of the others than full depth those are left out whose name and schedule do not begin as wanted.
    """
    found = [Competitor("full depth", "verify", NEVER)]
    found.append(Competitor("full depth, again", "verify", "lock-step"))
    for layer, length in static:
        policy = partial(StaticDraft, layer=layer, length=length)
        for schedule in ("lock-step", "together", "priced"):
            name = f"static, exit {layer}, {length}"
            found.append(Competitor(name, "verify", schedule, policy))
    return found[:1] + [
        each
        for each in found[1:]
        if each.name.startswith(wanted) or (each.schedule or "").startswith(wanted)
    ]


def engines_of(model: Any, batch: int, drafting: bool) -> dict[str, AdaptiveEngine]:
    """An engine for each schedule; of drafts, what the priced one has learned lasts, as in use.

    Full depth then has an engine of its own, to take steps in turn with the others.
    """
    config = EngineConfig(prefill_tokens=2**20)
    plain = AdaptiveEngine(model, slots=batch, config=config)
    if not drafting:
        if model.device.type != "cuda":
            return {"lock-step": plain}
        launching = replace(config, cuda_graphs=False)
        launched = AdaptiveEngine(model, slots=batch, config=launching)
        return {"lock-step": plain, LAUNCHED: launched}
    schedules = {
        "together": Schedule(together=True, rows=batch, patience=12),
        "priced": Schedule(costs=profiled(plain), patience=12),
    }
    return {"lock-step": plain, NEVER: AdaptiveEngine(model, slots=batch, config=config)} | {
        name: AdaptiveEngine(model, slots=batch, config=replace(config, schedule=schedule))
        for name, schedule in schedules.items()
    }


def profiled(engine: AdaptiveEngine) -> CostTable:
    """What launches cost, up to the engine's slots."""
    rows = tuple(n for n in (1, 2, 4, 8, 16, 32) if n < engine.kv.slots)
    table_VK = np.random.default_rng(0).integers(
        0, engine.stack.vocab, (engine.stack.vocab, 64), np.int32
    )
    config = ProfileConfig(rows=(*rows, engine.kv.slots), tokens=(1, 5, 9), limit_s=PROFILE_S)
    return measure_costs(engine, table_VK, config).costs
