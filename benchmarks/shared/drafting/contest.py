"""Contenders that decode the same documents in turn, and what they are worth against each other.

Shape suffixes: S seeds, D documents, V vocabulary, K candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from offramp.agents.drafting.draft_chances import FittedChances, odds_of
from offramp.agents.drafting.draft_net import router_of
from offramp.agents.drafting.draft_ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.draft_replay import Chosen, at_exits, replay_drafts
from offramp.controller.costs.table import CostTable
from offramp.controller.features import MAX_PENDING, IntArray
from offramp.controller.policies.protocols import Policy
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker import AdaptiveEngine
from shared.drafting.turns import Entry, compare
from shared.timing import Report, hugging_face, ours

RESAMPLES = 5000
SAY = Console(width=150)


@dataclass
class ContestRow:
    policy: str
    seeds: int
    offline_rate: float | None
    tokens_per_s: float
    ratio_full: float
    ratio_full_low: float
    ratio_full_high: float
    ratio_static: float
    ratio_static_low: float
    ratio_static_high: float
    cpu_ratio_static: float
    cpu_ratio_static_low: float
    cpu_ratio_static_high: float
    drafts_per_cycle: float | None
    accepted: float | None
    layers_per_token: float | None
    decision_share: float | None
    equal: float | None
    """Share of prompts whose tokens were the first contender's."""


def require_equal(contenders: list[Entry]) -> None:
    """Refuse what is not the first contender's output, token for token."""
    for each in contenders:
        assert all(each.equal), f"{each.name} is not lossless"


def rows_of(contenders: list[Entry], static: str) -> list[ContestRow]:
    full = contenders[0]
    [base] = [each for each in contenders if each.name == static]
    groups: dict[str, list[Entry]] = {}
    for each in contenders:
        groups.setdefault(each.name.partition(", seed")[0], []).append(each)
    rng = np.random.default_rng(0)
    rows = []
    for name, members in groups.items():
        seconds_SD = np.array([each.seconds for each in members])
        cpu_SD = np.array([[turn.cpu_s for turn in each.turns] for each in members])
        offline = [each.offline for each in members if each.offline is not None]
        per_full = interval(np.array(full.seconds), seconds_SD, rng)
        per_static = interval(np.array(base.seconds), seconds_SD, rng)
        tokens = [turn.tokens for turn in members[0].turns]
        tokens_per_s = float(np.mean(tokens) / seconds_SD.mean())
        per_cpu = interval(np.array([turn.cpu_s for turn in base.turns]), cpu_SD, rng)
        earned = float(np.mean(offline)) if offline else None
        rows.append(ContestRow(name, len(members), earned, tokens_per_s, *per_full, *per_static,
                        *per_cpu, *details(members)))  # fmt: skip
    return rows


def interval(
    base_D: NDArray[np.float64], seconds_SD: NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Speed-up over a baseline, documents and seeds drawn with replacement, 95 %."""
    seeds, documents = seconds_SD.shape
    draws = rng.integers(documents, size=(RESAMPLES, documents))
    seed_draws = rng.integers(seeds, size=(RESAMPLES, seeds))
    below = np.array([seconds_SD[s][:, d].mean(0).sum() for s, d in zip(seed_draws, draws,
                                                                       strict=True)])  # fmt: skip
    low, high = np.percentile(base_D[draws].sum(1) / below, [2.5, 97.5])
    return float(base_D.sum() / seconds_SD.mean(0).sum()), float(low), float(high)


def details(members: list[Entry]) -> tuple[float | None, ...]:
    turns = [turn for each in members for turn in each.turns]
    alike = [equal for each in members for equal in each.equal]
    equal = float(np.mean(alike)) if alike else None
    drafts = sum(turn.drafts or 0 for turn in turns)
    if turns[0].drafts is None:
        return (None, None, None, None, equal)
    accepted = sum(turn.accepted for turn in turns)
    tokens = sum(turn.tokens for turn in turns)
    return (
        drafts / (tokens - accepted),
        accepted / drafts if drafts else None,
        sum(turn.layer_calls for turn in turns) / tokens,
        sum(turn.deciding_s for turn in turns) / sum(turn.seconds for turn in turns),
        equal,
    )


def show(rows: list[ContestRow], console: Console) -> None:
    table = Table("policy", "seeds", "offline", "tokens/s", "÷ full depth", "÷ best static",
                  "÷ static, processor time", "drafts a cycle", "accepted", "layers a token",
                  "decisions", "equal")  # fmt: skip
    for row in rows:
        full = f"{row.ratio_full:.3f} ({row.ratio_full_low:.3f}-{row.ratio_full_high:.3f})"
        static = f"{row.ratio_static:.3f} ({row.ratio_static_low:.3f}-{row.ratio_static_high:.3f})"
        cpu = f"{row.cpu_ratio_static:.3f} ({row.cpu_ratio_static_low:.3f}-"
        cpu += f"{row.cpu_ratio_static_high:.3f})"
        table.add_row(
            row.policy, str(row.seeds), number(row.offline_rate, ".3f"), f"{row.tokens_per_s:.1f}",
            full, static, cpu, number(row.drafts_per_cycle, ".2f"),
            number(row.accepted, ".0%"), number(row.layers_per_token, ".1f"),
            number(row.decision_share, ".1%"), number(row.equal, ".0%"),
        )  # fmt: skip
    console.print(table)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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
    fitted: FittedChances,
    config: DraftPPOConfig,
    exits: tuple[int, ...],
    table_VK: IntArray | None,
) -> Chosen:
    """PPO trained on recorded tokens and replayed on validation ones; headless with a table."""
    start = time.perf_counter()
    fitted = fitted.part(exits)
    model = train_drafter(at_exits(train, exits), costs, fitted, config, candidates_VK=table_VK)
    router = router_of(model, fitted.chances, exits, config.max_pending, table_VK)
    shown = at_exits(validation, exits, states=True)
    odds_NE = odds_of(fitted.chances, shown)
    offline = replay_drafts(router, shown, costs, config.max_pending, odds_NE)
    spent = time.perf_counter() - start
    kind = "PPO" if table_VK is None else "headless PPO"
    name = f"{kind}, exits {', '.join(map(str, exits))}, seed {config.seed}"
    SAY.print(f"{name}: {offline.rate:.3f} offline, {spent:.0f} s")
    return Chosen(name, router, offline)


def clocked(
    engine: AdaptiveEngine, candidates: list[Chosen], prompts: list[list[int]], new_tokens: int
) -> Chosen:
    """The fastest by the clock on validation prompts."""
    runs = [Entry(c.name, in_engine(engine, c.policy, new_tokens), c.offline.rate)
            for c in candidates]  # fmt: skip
    compare(runs, prompts)
    totals = [sum(run.seconds) for run in runs]
    for run, total in zip(runs, totals, strict=True):
        speed = sum(turn.tokens for turn in run.turns) / total
        SAY.print(f"{run.name}: {run.offline:.3f} offline, {speed:.1f} tokens/s")
    return candidates[int(np.argmin(totals))]


def best_assistant(
    engine: AdaptiveEngine, exits: tuple[int, ...], prompts: list[list[int]], new_tokens: int
) -> str:
    """Hugging Face's own early exit at the layer that is fastest by the clock."""
    names = [f"HF assistant_early_exit={layer}" for layer in exits]
    runs = [Entry(name, in_hugging_face(engine, name, new_tokens)) for name in names]
    compare(runs, prompts)
    return names[int(np.argmin([sum(run.seconds) for run in runs]))]


def in_engine(
    engine: AdaptiveEngine, policy: Policy, new_tokens: int, temperature: float = 0.0
) -> Callable[..., Report]:
    """A contender that is a policy of the engine, in ``verify``."""
    return lambda prompt: ours(engine, [prompt], new_tokens, policy, "verify", temperature)


def in_hugging_face(
    engine: AdaptiveEngine, name: str, new_tokens: int, temperature: float = 0.0, **options: Any
) -> Callable[..., Report]:
    """A contender that is Hugging Face's ``generate`` with some options."""
    return lambda prompt: hugging_face(
        engine.model, [prompt], new_tokens, name, temperature, **options
    )
