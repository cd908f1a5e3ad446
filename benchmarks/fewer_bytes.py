"""What are fewer bytes worth? Quality of int8 and int4 weights, their speed, and drafts on a copy.

Three tables, bfloat16, of a real model on documents that it never saw:

*quality*: how often a quantised model's most likely token is the native one's, and its perplexity
over the native one's, teacher-forced.

*speed*: full depth with such weights over full depth with native ones, by batch.

*drafts*: in ``verify`` a copy in fewer bytes drafts and native full depth judges, at batch 1, with
no training. The number of drafts is fixed; each run is divided by full depth's on the same prompt.
Tokens are full depth's; ``differ`` counts prompts where a tie in bfloat16 fell the other way.

With ``--shape`` the weights are random, and only speed is real; ``at acceptance`` then estimates
what drafts would be worth if each were accepted with a chance that was measured elsewhere.

    python benchmarks/fewer_bytes.py --json fewer_bytes.json
    python benchmarks/fewer_bytes.py --quick
    python benchmarks/fewer_bytes.py --shape qwen2.5-0.5b --acceptance 0.85
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from shared.timing import Report, ours
from shared.workload import build, prompts_of
from torch.nn.functional import cross_entropy

from offramp.agents.recording.corpus import load_corpus, tokenize
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.attention import prefill_window
from offramp.worker.model.loading import load_model
from offramp.worker.model.precision import Precision
from offramp.worker.profiling.profile import describe_machine

KINDS = (
    "int8",
    "int8,native",
    "int4,native",
    "int4",
    "int4,int4",
    "int4:64",
    "int4/int8",
    "int4,shortlist/int8",
)
COPIES = ("int8", "int4", "int4,shortlist/int8")
PROMPT = 64
RESAMPLES = 2000
SAY = Console(width=130, highlight=False)


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    shape: Annotated[str | None, typer.Option(help="Random weights of a shape instead.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Documents.", show_default="as for record")
    ] = None,
    documents: Annotated[int, typer.Option(help="Test documents.")] = 24,
    tokens: Annotated[int, typer.Option(help="New tokens of a run.")] = 64,
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,4,8",
    copies: Annotated[str, typer.Option(help="Weights of copies, by spaces.")] = " ".join(COPIES),
    lengths: Annotated[str, typer.Option(help="Drafts, comma-separated.")] = "2,3,4,6,8",
    acceptance: Annotated[float | None, typer.Option(help="Chance that a draft is right.")] = None,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    quick: Annotated[bool, typer.Option(help="Little of everything, in < 4 minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    if quick:
        documents, tokens, batches = min(documents, 6), min(tokens, 32), "1,8"
    dtype = torch.bfloat16
    native = build(shape, dtype) if shape else load_model(model, dtype, "cpu")
    found: dict[str, Any] = {"machine": describe_machine(dtype), "threads": threads,
                             "model": shape or Path(model).name, "new_tokens": tokens}  # fmt: skip
    SAY.print(f"{found['machine']}; {threads} threads; {found['model']}, bfloat16")
    if shape:
        texts = prompts_of(native, shape, documents)
    else:
        texts = _unseen(model, corpus, documents)
        found["quality"] = quality(native, texts)
        _show("quality", found["quality"])
    kinds = tuple(copies.split())
    found["speed"] = speed(native, texts, [int(n) for n in batches.split(",")], tokens, kinds)
    _show("speed", found["speed"])
    plans = [(kind, int(length)) for kind in kinds for length in lengths.split(",")]
    found["drafts"] = drafts(native, texts, tokens, plans, acceptance)
    _show("drafts", found["drafts"])
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def _unseen(model: str, corpus: Path | None, documents: int) -> list[list[int]]:
    """Tokens of test documents, 256 of each at most."""
    pairs = tokenize(model, load_corpus(corpus))
    test = [ids[:256] for document, ids in pairs if document.split == "test" and len(ids) > PROMPT]
    return test[:documents]


def _engine(native: Any, slots: int, **settings: Any) -> AdaptiveEngine:
    return AdaptiveEngine(
        native, slots=slots, config=EngineConfig(prefill_tokens=2**20, **settings)
    )


def quality(native: Any, texts: list[list[int]]) -> list[dict[str, Any]]:
    """Agreement and perplexity of quantised models, teacher-forced."""
    truth = [_logits(_engine(native, 1), text) for text in texts]
    count = sum(map(len, texts))
    loss = _loss(truth, texts)
    rows = [{"weights": "native", "agreement": 1.0, "perplexity": math.exp(loss)}]
    for kind in KINDS:
        engine = _engine(native, 1, precision=Precision.parse(kind))
        given = [_logits(engine, text) for text in texts]
        same = sum(int((a.argmax(-1) == b.argmax(-1)).sum())
                   for a, b in zip(given, truth, strict=True))  # fmt: skip
        rows.append({"weights": kind, "agreement": same / count,
                     "perplexity": math.exp(_loss(given, texts))})  # fmt: skip
    return rows


@torch.inference_mode()
def _logits(engine: AdaptiveEngine, text: list[int]) -> torch.Tensor:
    """Logits after each token of a text, [T, V]."""
    stack, positions_1T = engine.stack, torch.arange(len(text))[None]
    x_1TD = stack.embed(torch.tensor([text]), positions_1T)
    rotary = stack.rotary(x_1TD, positions_1T)
    engine.kv.reserve(len(text))
    window = prefill_window(0, 0, len(text), stack.heads_per_key, x_1TD)
    engine.kv.open(window)
    for index in range(stack.layers):
        x_1TD = stack.run_layer(index, x_1TD, rotary, window, engine.kv)
    return stack.logits(x_1TD[0]).float()


def _loss(logits: list[torch.Tensor], texts: list[list[int]]) -> float:
    losses = [cross_entropy(each[:-1], torch.tensor(text[1:]), reduction="sum").item()
              for each, text in zip(logits, texts, strict=True)]  # fmt: skip
    return sum(losses) / sum(len(text) - 1 for text in texts)


def speed(
    native: Any, texts: list[list[int]], batches: list[int], tokens: int, copies: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Full depth with fewer bytes over full depth with native weights, runs in turn."""
    rows = []
    for batch in batches:
        prompts = [(texts * batch)[n][:PROMPT] for n in range(batch)]
        kinds = ("native", *copies)
        engines = {kind: _engine(native, batch, precision=Precision.parse(kind)) for kind in kinds}
        runs: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(8):
            for kind, engine in engines.items():
                report = ours(engine, prompts, tokens, NeverExit())
                if turn:  # the first warms up
                    runs[kind].append(report.tokens / report.seconds)
        for kind in kinds:
            pairs = zip(runs[kind], runs["native"], strict=True)
            ratios = [mine / theirs for mine, theirs in pairs]
            rows.append({"weights": kind, "batch": batch, "tokens_per_s": median(runs[kind]),
                         "ratio_native": median(ratios), "low": min(ratios),
                         "high": max(ratios)})  # fmt: skip
    return rows


def drafts(
    native: Any,
    texts: list[list[int]],
    tokens: int,
    plans: list[tuple[str, int]],
    acceptance: float | None,
) -> list[dict[str, Any]]:
    """Drafts on a copy against native full depth, prompt by prompt in turn."""
    full = _engine(native, 1)
    layers = full.stack.layers
    copies = {kind: _engine(native, 1, kv_mode="verify", draft_precision=Precision.parse(kind))
              for kind in dict(plans)}  # fmt: skip
    base: list[Report] = []
    runs: dict[tuple[str, int], list[Report]] = {each: [] for each in plans}
    for index, text in enumerate([texts[0], *texts]):
        prompt = [text[:PROMPT]]
        first = ours(full, prompt, tokens, NeverExit())
        mine = {each: ours(copies[each[0]], prompt, tokens,
                           StaticDraft(layer=Exit(layers, Precision.parse(each[0]).weights),
                                       length=each[1]), "verify")
                for each in plans}  # fmt: skip
        if index:  # the first prompt warms up
            base.append(first)
            for each, report in mine.items():
                runs[each].append(report)
    return [_draft_row(each, base, runs[each], acceptance) for each in plans]


def _draft_row(
    each: tuple[str, int], base: list[Report], mine: list[Report], acceptance: float | None
) -> dict[str, Any]:
    done = [report.rows[0] for report in mine]
    made, accepted = (sum(getattr(row, f"drafts_{what}") for row in done)
                      for what in ("made", "accepted"))  # fmt: skip
    ratios = _ratios([run.seconds for run in base], [run.seconds for run in mine])
    row = {"copy": each[0], "drafts": each[1], "accepted": accepted / made,
           "ratio_full": ratios[0], "low": ratios[1], "high": ratios[2],
           "differ": sum(a.emitted != b.rows[0].emitted
                         for a, b in zip(done, base, strict=True))}  # fmt: skip
    if acceptance is not None:
        cycle_s = sum(run.seconds for run in mine) / (made / each[1])
        token_s = sum(run.seconds for run in base) / sum(run.tokens for run in base)
        expected = sum(acceptance**n for n in range(each[1] + 1))
        row["at_acceptance"] = expected * token_s / cycle_s
    return row


def _ratios(theirs: Sequence[float], mine: Sequence[float]) -> tuple[float, float, float]:
    """Total over total, and its 95 % interval over prompts (paired bootstrap)."""
    a, b = np.asarray(theirs), np.asarray(mine)
    drawn = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.percentile(a[drawn].sum(1) / b[drawn].sum(1), (2.5, 97.5))
    return float(a.sum() / b.sum()), float(low), float(high)


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    SAY.print(table)


if __name__ == "__main__":
    typer.run(main)
