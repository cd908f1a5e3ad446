"""Lossless decoding at batch 1: does learning to draft pay?

Every contender decodes the same test documents in the real engine (``verify``), greedily, and its
output must be full depth's token for token. All is chosen before: settings of the rules by replay
on validation documents at costs measured in this run, the three best static ones then by the clock
on validation documents; PPO is trained on training documents. Contenders take turns document by
document, so a ratio compares neighbours in time; intervals are paired document bootstraps.

    python benchmarks/lossless.py --json lossless.json
    python benchmarks/lossless.py --quick
    python benchmarks/lossless.py --read docs/lossless.json --plot docs/lossless.png

The last measures nothing: it draws what a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shared.drafting.contest import (
    SAY,
    best_assistant,
    clocked,
    in_engine,
    in_hugging_face,
    one_drafter,
    parts_of,
    require_equal,
    rows_of,
    show,
)
from shared.drafting.lossless_plot import draw_lossless
from shared.drafting.turns import Entry, compare

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.draft_replay import Chosen, confident_grid
from offramp.agents.recording.corpus import load_corpus, tokenize
from offramp.agents.recording.documents import Document
from offramp.controller.costs.table import CostTable
from offramp.controller.features import IntArray
from offramp.controller.policies.protocols import NeverExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.draft_rules import del_rule, hindsight, static_grid, thompson_grid
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import describe_machine, measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

MODEL = "models/reference"
CANDIDATES = 64


@dataclass(frozen=True)
class Extent:
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


QUICK = Extent(documents=60, recorded=64, steps=200_000, learned_exits=((3, 6),), seeds=2,
             test_documents=4, new_tokens=48, profile_s=10.0)  # fmt: skip


def main(
    quick: Annotated[bool, typer.Option(help="Little of everything, in < 4 minutes.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    read: Annotated[Path | None, typer.Option(help="Measure nothing; take this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture here (PNG).")] = None,
) -> None:
    found = measure(quick, threads) if read is None else json.loads(read.read_text())
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))
    if plot is not None:
        draw_lossless(found, plot)


def measure(quick: bool, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    plan = QUICK if quick else Extent()
    recorder = AdaptiveEngine.from_pretrained(MODEL, slots=16)
    engine = AdaptiveEngine(recorder.model, recorder.tokenizer, slots=1)
    split = documents_of(plan)
    table_VK = table_of(recorder, split["train"], plan)
    train, validation = (record(recorder, split[name], plan) for name in ("train", "validation"))
    headless = [record(recorder, split[name], plan, table_VK) for name in ("train", "validation")]
    costs = profile(engine, plan)
    SAY.print(parts_of(costs))
    unseen = [tokens[: plan.prompt] for _, tokens in split["validation"]]
    best = {
        "static": clocked(engine, static_grid(validation, costs)[:3], unseen[:10], plan.new_tokens),
        "confidence": confident_grid(validation, costs)[0],
        "headless confidence": confident_grid(headless[1], costs, table_VK)[0],
        "DEL": del_rule(train, validation, costs)[0],
        "Thompson": thompson_grid(validation, costs)[0],
    }
    learned = [
        *learn((train, validation), costs, plan),
        *learn((headless[0], headless[1]), costs, plan, table_VK),
    ]
    assistant = best_assistant(engine, plan.exits, unseen[:3], plan.new_tokens)
    contenders = [
        Entry("full depth", in_engine(engine, NeverExit(), plan.new_tokens)),
        *(Entry(c.name, in_engine(engine, c.policy, plan.new_tokens), c.offline.rate)
          for c in (*best.values(), *learned)),
        Entry(assistant, in_hugging_face(engine, assistant, plan.new_tokens)),
    ]  # fmt: skip
    compare(contenders, [tokens[: plan.prompt] for _, tokens in split["test"]])
    require_equal(contenders[:-1])
    rows = rows_of(contenders, best["static"].name)
    show(rows, SAY)
    found = {
        "machine": describe_machine(engine.model.dtype),
        "costs": parts_of(costs),
        "hindsight": {
            "exits": validation.header.exits,
            "rate": hindsight(validation, costs),
            "headless_rate": hindsight(headless[1], costs),
        },
        "test_documents": len(contenders[0].seconds),
        "new_tokens": plan.new_tokens,
        "rows": [asdict(row) for row in rows],
    }
    SAY.print(f"hindsight on validation documents, offline: {found['hindsight']}")
    return found


def documents_of(plan: Extent) -> dict[str, list[tuple[Document, list[int]]]]:
    pairs = tokenize(MODEL, load_corpus(None, limit=plan.documents))
    long = [(doc, tokens) for doc, tokens in pairs if len(tokens) > plan.prompt]
    split = {name: [pair for pair in long if pair[0].split == name]
             for name in ("train", "validation", "test")}  # fmt: skip
    split["test"] = split["test"][: plan.test_documents]
    return split


def table_of(
    engine: AdaptiveEngine, documents: Sequence[tuple[Document, list[int]]], plan: Extent
) -> IntArray:
    """Candidates by what the model itself says after each token, in training documents."""
    prompts = [tokens[: plan.prompt] for _, tokens in documents]
    sampling = SamplingParams(max_tokens=plan.recorded, ignore_eos=True)
    done = engine.generate(prompts, sampling, NeverExit(), kv_mode="project")
    spoken = [[*prompt, *each.token_ids] for prompt, each in zip(prompts, done, strict=True)]
    return successor_table(spoken, engine.stack.vocab, CANDIDATES)


def record(
    engine: AdaptiveEngine,
    documents: Sequence[tuple[Document, list[int]]],
    plan: Extent,
    table_VK: IntArray | None = None,
) -> TokenTraces:
    wanted = Continuations(exits=plan.exits, prompt_tokens=plan.prompt, new_tokens=plan.recorded)
    traces = record_continuations(engine, documents, wanted, candidates_VK=table_VK)
    agree = dict(zip(plan.exits, traces.agree_NE.mean(0).round(3).tolist(), strict=True))
    kind = "head" if table_VK is None else "best candidate"
    SAY.print(f"{len(documents)} documents, {len(traces)} tokens; {kind} right by exit: {agree}")
    return traces


def profile(engine: AdaptiveEngine, plan: Extent) -> CostTable:
    table_VK = np.tile(np.arange(64, dtype=np.int32), (engine.stack.vocab, 1))
    config = ProfileConfig(rows=(1,), context=plan.prompt + plan.new_tokens // 2,
                           limit_s=plan.profile_s)  # fmt: skip
    return measure_costs(engine, table_VK, config).costs


def learn(
    split: tuple[TokenTraces, TokenTraces],
    costs: CostTable,
    plan: Extent,
    table_VK: IntArray | None = None,
) -> list[Chosen]:
    """PPO on the exits that validation prefers, every seed."""

    def train(exits: tuple[int, ...], seed: int) -> Chosen:
        return one_drafter(*split, costs, DraftPPOConfig(steps=plan.steps, seed=seed), exits,
                           table_VK)  # fmt: skip

    by_exits = {exits: train(exits, 0) for exits in plan.learned_exits}
    exits = max(by_exits, key=lambda key: by_exits[key].offline.rate)
    return [by_exits[exits], *(train(exits, seed) for seed in range(1, plan.seeds))]


if __name__ == "__main__":
    typer.run(main)
