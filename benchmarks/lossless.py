"""Lossless decoding at batch 1: does learning to draft pay?

Every contender decodes the same test documents in the real engine (``verify``), greedily, and its
output must be full depth's token for token. All is chosen before: settings of the rules by replay
on validation documents at costs measured in this run, the three best static ones then by the clock
on validation documents; PPO is trained on training documents. Contenders take turns document by
document, so a ratio compares neighbours in time; intervals are paired document bootstraps.

    python benchmarks/lossless.py --json lossless.json
    python benchmarks/lossless.py --quick
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from timing import Report, hugging_face, ours

from offramp.agents.corpus import Document, load_corpus
from offramp.agents.drafting.choose import (
    Chosen,
    confident_grid,
    del_rule,
    hindsight,
    static_grid,
    thompson_grid,
)
from offramp.agents.drafting.export import router_of
from offramp.agents.drafting.ppo import DraftPPOConfig, train_drafter
from offramp.agents.drafting.record import Continuations, record_continuations
from offramp.agents.drafting.replay import at_exits, replay_decisions
from offramp.agents.record import tokenize
from offramp.controller.costs import CostTable
from offramp.controller.policy import NeverExit, Policy
from offramp.envs.draft_core import MAX_PENDING
from offramp.envs.tokens import TokenTraces
from offramp.worker import AdaptiveEngine
from offramp.worker.profile import describe_machine, measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

MODEL = "models/reference"
RESAMPLES = 5000
SAY = Console(width=150)


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    documents: int = 320
    exits: tuple[int, ...] = (2, 3, 5, 6)
    learned_exits: tuple[tuple[int, ...], ...] = ((3, 6), (2, 3, 6), (2, 3, 5, 6))
    prompt: int = 64
    recorded: int = 192
    steps: int = 1_500_000
    seeds: int = 5
    test_documents: int = 40
    new_tokens: int = 128
    profile_s: float = 60.0


QUICK = Plan(documents=60, recorded=64, steps=200_000, learned_exits=((3, 6),), seeds=2,
             test_documents=4, new_tokens=48, profile_s=10.0)  # fmt: skip


@dataclass
class Contender:
    name: str
    run: Callable[[list[int]], Report]
    offline: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)


@dataclass
class Row:
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


def main(
    quick: Annotated[bool, typer.Option(help="Little of everything, in < 4 minutes.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    plan = QUICK if quick else Plan()
    recorder = AdaptiveEngine.from_pretrained(MODEL, slots=16)
    engine = AdaptiveEngine(recorder.model, recorder.tokenizer, slots=1)
    split = documents_of(plan)
    train, validation = (record(recorder, split[name], plan) for name in ("train", "validation"))
    costs = profile(engine, plan)
    SAY.print(parts_of(costs))
    best = {
        "static": clocked(engine, static_grid(validation, costs)[:3], split["validation"], plan),
        "confidence": confident_grid(validation, costs)[0],
        "DEL": del_rule(train, validation, costs)[0],
        "Thompson": thompson_grid(validation, costs)[0],
    }
    learned = learn(train, validation, costs, plan)
    assistant = best_assistant(engine, split["validation"], plan)
    contenders = [
        Contender("full depth", in_engine(engine, NeverExit(), plan)),
        *(Contender(c.name, in_engine(engine, c.policy, plan), c.offline.rate)
          for c in best.values()),
        *(Contender(f"{c.name}, seed {seed}", in_engine(engine, c.policy, plan), c.offline.rate)
          for seed, c in enumerate(learned)),
        Contender(assistant, in_hugging_face(engine, assistant, plan)),
    ]  # fmt: skip
    compare(contenders, [tokens[: plan.prompt] for _, tokens in split["test"]])
    rows = rows_of(contenders, best["static"].name)
    show(rows)
    found = {
        "machine": describe_machine(engine.model.dtype),
        "costs": parts_of(costs),
        "hindsight": {
            "exits": validation.header.exits,
            "rate": hindsight(validation, costs),
        },
        "test_documents": len(contenders[0].seconds),
        "new_tokens": plan.new_tokens,
        "rows": [asdict(row) for row in rows],
    }
    SAY.print(f"hindsight on validation documents, offline: {found['hindsight']}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def documents_of(plan: Plan) -> dict[str, list[tuple[Document, list[int]]]]:
    pairs = tokenize(MODEL, load_corpus(None, limit=plan.documents))
    long = [(doc, tokens) for doc, tokens in pairs if len(tokens) > plan.prompt]
    split = {name: [pair for pair in long if pair[0].split == name]
             for name in ("train", "validation", "test")}  # fmt: skip
    split["test"] = split["test"][: plan.test_documents]
    return split


def record(
    engine: AdaptiveEngine, documents: Sequence[tuple[Document, list[int]]], plan: Plan
) -> TokenTraces:
    wanted = Continuations(exits=plan.exits, prompt_tokens=plan.prompt, new_tokens=plan.recorded)
    traces = record_continuations(engine, documents, wanted)
    agree = dict(zip(plan.exits, traces.agree_NE.mean(0).round(3).tolist(), strict=True))
    SAY.print(f"{len(documents)} documents, {len(traces)} tokens; right by exit: {agree}")
    return traces


def profile(engine: AdaptiveEngine, plan: Plan) -> CostTable:
    table_VK = np.tile(np.arange(64, dtype=np.int32), (engine.stack.vocab, 1))
    config = ProfileConfig(rows=(1,), context=plan.prompt + plan.new_tokens // 2,
                           limit_s=plan.profile_s)  # fmt: skip
    return measure_costs(engine, table_VK, config).costs


def parts_of(costs: CostTable) -> dict[str, Any]:
    one = costs.with_probe("softmax").at(1)
    names = ("layer", "head", "probe", "policy", "step", "build", "full")
    parts: dict[str, Any] = {f"{n}_us": round(1e6 * getattr(one, f"{n}_s"), 1) for n in names}
    parts["layer_us_by_tokens"] = {
        n: round(1e6 * costs.launch(n).layer_s, 1) for n in range(1, MAX_PENDING + 2)
    }
    return parts


def learn(
    train: TokenTraces, validation: TokenTraces, costs: CostTable, plan: Plan
) -> list[Chosen]:
    """PPO on the exits that validation prefers, every seed."""
    by_exits = {
        exits: [one_drafter(train, validation, costs, plan, exits, 0)]
        for exits in plan.learned_exits
    }
    exits = max(by_exits, key=lambda key: by_exits[key][0].offline.rate)
    more = [one_drafter(train, validation, costs, plan, exits, s) for s in range(1, plan.seeds)]
    return by_exits[exits] + more


def one_drafter(
    train: TokenTraces,
    validation: TokenTraces,
    costs: CostTable,
    plan: Plan,
    exits: tuple[int, ...],
    seed: int,
) -> Chosen:
    start = time.perf_counter()
    config = DraftPPOConfig(steps=plan.steps, seed=seed)
    model = train_drafter(at_exits(train, exits), costs, config)
    offline = replay_decisions(
        lambda obs: model.predict(obs, deterministic=True)[0], at_exits(validation, exits), costs
    )
    spent = time.perf_counter() - start
    SAY.print(f"PPO, exits {exits}, seed {seed}: {offline.rate:.3f} offline, {spent:.0f} s")
    name = f"PPO, exits {', '.join(map(str, exits))}"
    return Chosen(name, router_of(model, exits, MAX_PENDING), offline)


def clocked(
    engine: AdaptiveEngine,
    candidates: list[Chosen],
    documents: Sequence[tuple[Document, list[int]]],
    plan: Plan,
) -> Chosen:
    """The fastest by the clock on validation documents."""
    runs = [Contender(c.name, in_engine(engine, c.policy, plan), c.offline.rate)
            for c in candidates]  # fmt: skip
    compare(runs, [tokens[: plan.prompt] for _, tokens in documents[:10]])
    totals = [sum(run.seconds) for run in runs]
    for run, total in zip(runs, totals, strict=True):
        SAY.print(f"{run.name}: {run.offline:.3f} offline, {sum(run.tokens) / total:.1f} tokens/s")
    return candidates[int(np.argmin(totals))]


def best_assistant(
    engine: AdaptiveEngine, documents: Sequence[tuple[Document, list[int]]], plan: Plan
) -> str:
    names = [f"HF assistant_early_exit={layer}" for layer in plan.exits]
    runs = [Contender(name, in_hugging_face(engine, name, plan)) for name in names]
    compare(runs, [tokens[: plan.prompt] for _, tokens in documents[:3]], same=False)
    return names[int(np.argmin([sum(run.seconds) for run in runs]))]


def in_engine(engine: AdaptiveEngine, policy: Policy, plan: Plan) -> Callable[..., Report]:
    return lambda prompt: ours(engine, [prompt], plan.new_tokens, policy, "verify")


def in_hugging_face(engine: AdaptiveEngine, name: str, plan: Plan) -> Callable[..., Report]:
    return lambda prompt: hugging_face(engine.model, [prompt], plan.new_tokens, name)


def compare(contenders: list[Contender], prompts: list[list[int]], same: bool = True) -> None:
    """Run all on all prompts in turn; the first prompt only warms up.

    Processor time, unlike the clock, counts the reading of the prompt, alike for all of ours.
    """
    for index, prompt in enumerate([prompts[0], *prompts]):
        expected: list[int] | None = None
        for turn in range(len(contenders)):
            each = contenders[(turn + index) % len(contenders)]
            cpu = time.process_time()
            report = each.run(prompt)
            cpu = time.process_time() - cpu
            if index > 0:
                each.seconds.append(report.seconds)
                each.cpu_s.append(cpu)
                each.tokens.append(report.tokens)
                each.reports.append(report)
            if same and report.rows:
                emitted = report.rows[0].emitted
                expected = expected or emitted
                assert emitted == expected, f"{each.name} is not lossless"


def rows_of(contenders: list[Contender], static: str) -> list[Row]:
    full = contenders[0]
    [base] = [each for each in contenders if each.name == static]
    groups: dict[str, list[Contender]] = {}
    for each in contenders:
        groups.setdefault(each.name.partition(", seed")[0], []).append(each)
    rng = np.random.default_rng(0)
    rows = []
    for name, members in groups.items():
        seconds_SD = np.array([each.seconds for each in members])
        cpu_SD = np.array([each.cpu_s for each in members])
        offline = [each.offline for each in members if each.offline is not None]
        per_full = interval(np.array(full.seconds), seconds_SD, rng)
        per_static = interval(np.array(base.seconds), seconds_SD, rng)
        tokens_per_s = float(np.mean(members[0].tokens) / seconds_SD.mean())
        per_cpu = interval(np.array(base.cpu_s), cpu_SD, rng)
        earned = float(np.mean(offline)) if offline else None
        rows.append(Row(name, len(members), earned, tokens_per_s, *per_full, *per_static,
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


def details(members: list[Contender]) -> tuple[float | None, ...]:
    reports = [report for each in members for report in each.reports]
    done = [row for report in reports for row in report.rows]
    if not done:
        return (None,) * 4
    drafts = sum(row.drafts_made for row in done)
    accepted = sum(row.drafts_accepted for row in done)
    tokens = sum(report.tokens for report in reports)
    return (
        drafts / (tokens - accepted),
        accepted / drafts if drafts else None,
        sum(row.layer_calls for row in done) / tokens,
        sum(report.deciding_s for report in reports) / sum(report.seconds for report in reports),
    )


def show(rows: list[Row]) -> None:
    table = Table("policy", "seeds", "offline", "tokens/s", "÷ full depth", "÷ best static",
                  "÷ static, processor time", "drafts a cycle", "accepted", "layers a token",
                  "decisions")  # fmt: skip
    for row in rows:
        full = f"{row.ratio_full:.3f} ({row.ratio_full_low:.3f}-{row.ratio_full_high:.3f})"
        static = f"{row.ratio_static:.3f} ({row.ratio_static_low:.3f}-{row.ratio_static_high:.3f})"
        cpu = f"{row.cpu_ratio_static:.3f} ({row.cpu_ratio_static_low:.3f}-"
        cpu += f"{row.cpu_ratio_static_high:.3f})"
        table.add_row(
            row.policy, str(row.seeds), number(row.offline_rate, ".3f"), f"{row.tokens_per_s:.1f}",
            full, static, cpu, number(row.drafts_per_cycle, ".2f"),
            number(row.accepted, ".0%"), number(row.layers_per_token, ".1f"),
            number(row.decision_share, ".1%"),
        )  # fmt: skip
    SAY.print(table)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    typer.run(main)
