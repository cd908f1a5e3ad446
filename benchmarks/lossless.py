"""Lossless decoding at batch 1: does learning to draft pay?

Every contender decodes the same test documents in the real engine (``verify``), greedily, and its
output must be full depth's token for token. All is chosen before: settings of the rules by replay
on validation documents at costs measured in this run, the three best static ones then by the clock
on validation documents; PPO is trained on training documents. Contenders take turns document by
document, so a ratio compares neighbours in time; intervals are paired document bootstraps.

    python benchmarks/lossless.py --json lossless.json
    python benchmarks/lossless.py --quick
    python benchmarks/lossless.py --model models/smollm2 --translators runs/layers --corpus FILE \\
        --dtype bfloat16
    python benchmarks/lossless.py --read docs/lossless.json --plot docs/lossless.png

Exits are those that are likeliest to pay by the model's own agreement and costs, unless ``--exits``
names them, on a copy in fewer bytes with ``--exits 30:int4``. The last command measures nothing: it
draws what a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from shared.drafting.lessons import spoken_table
from shared.drafting.lossless_plot import draw_lossless
from shared.drafting.turns import Entry, compare

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_chances import FittedChances, fit_chances, trusted_grid
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.draft_replay import Chosen, confident_grid
from offramp.agents.drafting.likely_exits import best_of, likely_exits
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.documents import Document
from offramp.agents.recording.own_text import begin_all
from offramp.controller.costs.table import CostTable
from offramp.controller.features import IntArray
from offramp.controller.policies.exits import copy_weights, is_on_copy
from offramp.controller.policies.protocols import NeverExit
from offramp.deploy.cli.options import parse_exits
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.draft_rules import del_rule, hindsight, static_grid, thompson_grid
from offramp.worker import AdaptiveEngine, EngineConfig, Precision
from offramp.worker.profiling.profile import describe_machine, measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

CANDIDATES = 64


@dataclass(frozen=True)
class Extent:
    """How much of everything; PPO is offered as many of the best exits as ``learned`` says."""

    documents: int = 320
    exits: tuple[int, ...] = ()
    learned: tuple[int, ...] = (2, 3, 4)
    prompt: int = 64
    recorded: int = 192
    steps: int = 1_500_000
    seeds: int = 5
    test_documents: int = 40
    new_tokens: int = 128
    profile_s: float = 60.0


QUICK = Extent(documents=60, learned=(2,), recorded=64, steps=200_000, seeds=2, test_documents=4,
               new_tokens=48, profile_s=10.0)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What decodes, and on which text.

    Attributes:
        exits: Where drafts may leave; () takes those that are likeliest to pay.
    """

    model: str
    corpus: Path | None
    translators: Path | None
    exits: tuple[int, ...]
    dtype: str


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    corpus: Annotated[
        Path | None,
        typer.Option(help="Documents: a folder or a file.", show_default="the standard library"),
    ] = None,
    translators: Annotated[Path | None, typer.Option(help="Of `offramp tune`.")] = None,
    exits: Annotated[
        str, typer.Option(help="Like 3,6 or 30:int4.", show_default="those likeliest to pay")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    quick: Annotated[bool, typer.Option(help="Little of everything, in < 4 minutes.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    read: Annotated[Path | None, typer.Option(help="Measure nothing; take this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture here (PNG).")] = None,
) -> None:
    if read is None:
        torch.set_num_threads(threads)
        subject = Subject(model, corpus, translators, parse_exits("exits", exits), dtype)
        found = measure(subject, QUICK if quick else Extent())
    else:
        found = json.loads(read.read_text())
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))
    if plot is not None:
        draw_lossless(found, plot)


def measure(subject: Subject, plan: Extent) -> dict[str, Any]:
    recorder = recording_engine(subject)
    engine = AdaptiveEngine(recorder.model, recorder.tokenizer, slots=1, config=recorder.config)
    split = prompts_of(recorder, subject.corpus, plan)
    exits = subject.exits or best_of(likely_exits(recorder, [doc for doc, _ in split["train"]]))
    plan = replace(plan, exits=exits)
    SAY.print(f"exits: {', '.join(map(str, exits))}")
    table_VK = table_of(recorder, split["train"], plan)
    train, validation = (record(recorder, split[name], plan) for name in ("train", "validation"))
    headless = [record(recorder, split[name], plan, table_VK) for name in ("train", "validation")]
    costs = profile(engine, plan)
    SAY.print(parts_of(costs))
    unseen = [prompt for _, prompt in split["validation"]]
    fitted = [fit_chances(each) for each in (train, headless[0])]
    best = {
        "static": clocked(engine, static_grid(validation, costs)[:3], unseen[:10], plan.new_tokens),
        "confidence": confident_grid(validation, costs)[0],
        "headless confidence": confident_grid(headless[1], costs, table_VK)[0],
        "trust": trusted_grid(fitted[0].chances, validation, costs)[0],
        "headless trust": trusted_grid(fitted[1].chances, headless[1], costs, table_VK)[0],
        "DEL": del_rule(train, validation, costs)[0],
        "Thompson": thompson_grid(validation, costs)[0],
    }
    learned = [
        *learn((train, validation), fitted[0], costs, plan),
        *learn((headless[0], headless[1]), fitted[1], costs, plan, table_VK),
    ]
    theirs = peers(engine, unseen[:3], plan)
    contenders = [
        Entry("full depth", in_engine(engine, NeverExit(), plan.new_tokens)),
        *(Entry(c.name, in_engine(engine, c.policy, plan.new_tokens), c.offline.rate)
          for c in (*best.values(), *learned)),
        *theirs,
    ]  # fmt: skip
    compare(contenders, [prompt for _, prompt in split["test"]])
    require_equal(contenders[: len(contenders) - len(theirs)])
    rows = rows_of(contenders, best["static"].name)
    show(rows, SAY)
    found = {
        "machine": describe_machine(engine.model.dtype),
        "model": engine.model_fingerprint,
        "adapters": engine.decoder.translators.digest,
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


def recording_engine(subject: Subject) -> AdaptiveEngine:
    copy = copy_weights(subject.exits)
    config = EngineConfig(
        translators=subject.translators, draft_precision=copy and Precision.for_drafts(copy)
    )
    return AdaptiveEngine.from_pretrained(
        subject.model, dtype=subject.dtype, slots=16, config=config
    )


def prompts_of(
    engine: AdaptiveEngine, corpus: Path | None, plan: Extent
) -> dict[str, list[tuple[Document, list[int]]]]:
    """Documents' beginnings by split; of conversations all before the first answer."""
    lengths = (plan.prompt, plan.recorded + 1)
    documents = load_corpus(corpus, limit=plan.documents)
    begun = begin_all(engine.tokenizer, documents, lengths, engine.stack.context)
    whole = [(doc, prompt) for doc, prompt in begun if doc.turns or len(prompt) == plan.prompt]
    split = {name: [pair for pair in whole if pair[0].split == name]
             for name in ("train", "validation", "test")}  # fmt: skip
    split["test"] = split["test"][: plan.test_documents]
    return split


def peers(engine: AdaptiveEngine, prompts: list[list[int]], plan: Extent) -> list[Entry]:
    """Hugging Face's way to draft at an exit of the model's own layers, if there are any."""
    own = tuple(layer for layer in plan.exits if not is_on_copy(layer))
    if not own:
        return []
    name = best_assistant(engine, own, prompts, plan.new_tokens)
    return [Entry(name, in_hugging_face(engine, name, plan.new_tokens))]


def table_of(
    engine: AdaptiveEngine, documents: Sequence[tuple[Document, list[int]]], plan: Extent
) -> IntArray:
    """Candidates by what the model itself says after each token, in training documents."""
    prompts = [prompt for _, prompt in documents]
    return spoken_table(engine, prompts, plan.recorded, CANDIDATES)


def record(
    engine: AdaptiveEngine,
    documents: Sequence[tuple[Document, list[int]]],
    plan: Extent,
    table_VK: IntArray | None = None,
) -> TokenTraces:
    wanted = Continuations(exits=plan.exits, prompt_tokens=None, new_tokens=plan.recorded)
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
    fitted: FittedChances,
    costs: CostTable,
    plan: Extent,
    table_VK: IntArray | None = None,
) -> list[Chosen]:
    """PPO on the exits that validation prefers, every seed."""

    def train(exits: tuple[int, ...], seed: int) -> Chosen:
        config = DraftPPOConfig(steps=plan.steps, seed=seed)
        return one_drafter(*split, costs, fitted, config, exits, table_VK)

    ranked = list(dict.fromkeys(c.policy.exits[0] for c in static_grid(split[1], costs, table_VK)))
    tried = {tuple(e for e in plan.exits if e in ranked[:count]) for count in plan.learned}
    by_exits = {exits: train(exits, 0) for exits in tried}
    exits = max(by_exits, key=lambda key: by_exits[key].offline.rate)
    return [by_exits[exits], *(train(exits, seed) for seed in range(1, plan.seeds))]


if __name__ == "__main__":
    typer.run(main)
