"""What benchmarks of lossless drafting share: contenders, and how the best of a kind is chosen.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from offramp.agents.drafting.draft_net import router_of
from offramp.agents.drafting.draft_ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.draft_replay import Chosen, at_exits, replay_decisions
from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.controller.policies.protocols import Policy
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker import AdaptiveEngine
from shared.contest import Entry, compare
from shared.timing import Report, hugging_face, ours

SAY = Console(width=150)


def parts_of(costs: CostTable) -> dict[str, Any]:
    """Microseconds of a token's parts, for a reader."""
    one = costs.with_probe("softmax").at(1)
    names = ("layer", "head", "probe", "policy", "step", "build", "full")
    parts: dict[str, Any] = {f"{n}_us": round(1e6 * getattr(one, f"{n}_s"), 1) for n in names}
    parts["layer_us_by_tokens"] = {
        n: round(1e6 * costs.launch(n).layer_s, 1) for n in range(1, MAX_PENDING + 2)
    }
    return parts


def one_drafter(
    train: TokenTraces,
    validation: TokenTraces,
    costs: CostTable,
    config: DraftPPOConfig,
    exits: tuple[int, ...],
    table_VK: IntArray | None,
) -> Chosen:
    """PPO trained on recorded tokens and replayed on validation ones; headless with a table."""
    start = time.perf_counter()
    model = train_drafter(at_exits(train, exits), costs, config)
    offline = replay_decisions(
        lambda obs: model.predict(obs, deterministic=True)[0], at_exits(validation, exits), costs
    )
    spent = time.perf_counter() - start
    kind = "PPO" if table_VK is None else "headless PPO"
    name = f"{kind}, exits {', '.join(map(str, exits))}, seed {config.seed}"
    SAY.print(f"{name}: {offline.rate:.3f} offline, {spent:.0f} s")
    return Chosen(name, router_of(model, exits, MAX_PENDING, table_VK), offline)


def clocked(
    engine: AdaptiveEngine, candidates: list[Chosen], prompts: list[list[int]], new_tokens: int
) -> Chosen:
    """The fastest by the clock on validation prompts."""
    runs = [Entry(c.name, in_engine(engine, c.policy, new_tokens), c.offline.rate)
            for c in candidates]  # fmt: skip
    compare(runs, prompts)
    totals = [sum(run.seconds) for run in runs]
    for run, total in zip(runs, totals, strict=True):
        SAY.print(f"{run.name}: {run.offline:.3f} offline, {sum(run.tokens) / total:.1f} tokens/s")
    return candidates[int(np.argmin(totals))]


def best_assistant(
    engine: AdaptiveEngine, exits: tuple[int, ...], prompts: list[list[int]], new_tokens: int
) -> str:
    """Hugging Face's own early exit at the layer that is fastest by the clock."""
    names = [f"HF assistant_early_exit={layer}" for layer in exits]
    runs = [Entry(name, in_hugging_face(engine, name, new_tokens)) for name in names]
    compare(runs, prompts)
    return names[int(np.argmin([sum(run.seconds) for run in runs]))]


def in_engine(engine: AdaptiveEngine, policy: Policy, new_tokens: int) -> Callable[..., Report]:
    """A contender that is a policy of the engine, in ``verify``."""
    return lambda prompt: ours(engine, [prompt], new_tokens, policy, "verify")


def in_hugging_face(
    engine: AdaptiveEngine, name: str, new_tokens: int, **options: Any
) -> Callable[..., Report]:
    """A contender that is Hugging Face's ``generate`` with some options."""
    return lambda prompt: hugging_face(engine.model, [prompt], new_tokens, name, **options)
