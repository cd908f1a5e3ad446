"""What does it gain to choose one row's kernel by measurement? Full depth, batch 1, float32.

Three ways in turns on the same prompts: products always with oneDNN's blocked layout (*packed*),
products as chosen on this machine (*chosen*; `worker/model/products.py`), and Hugging Face's
``generate`` (*hf*: KV cache, sdpa). Their tokens must be equal. A ratio is the median over rounds,
between its smallest and largest.

    python benchmarks/one_row.py --threads 1 --json products.json
    python benchmarks/one_row.py --quick
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from shared.timing import Report, hugging_face, ours
from shared.workload import build, prompts_of

from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.model.prepared import PackedLinear
from offramp.worker.profiling.profile import describe_machine

NEW_TOKENS = 32
SAY = Console(highlight=False)


def products(engine: AdaptiveEngine) -> list[PackedLinear]:
    """Every product of an engine's layers and head."""
    modules = [
        each for block in (*engine.stack.blocks, engine.stack.head) for each in block.modules()
    ]
    return [each for each in modules if isinstance(each, PackedLinear)]


def measure(shape: str, rounds: int) -> dict[str, Any]:
    model = build(shape, torch.float32)
    [prompt] = prompts_of(model, shape, 1)
    packed, chosen = (AdaptiveEngine(model, slots=1) for _ in range(2))
    plain = sum(each.packed.plain_rows > 0 for each in products(chosen))
    for each in products(packed):
        each.packed.plain_rows = 0
    ways: dict[str, Callable[[], Report]] = {
        "packed": lambda: ours(packed, [prompt], NEW_TOKENS, NeverExit()),
        "chosen": lambda: ours(chosen, [prompt], NEW_TOKENS, NeverExit()),
        "hf": lambda: hugging_face(model, [prompt], NEW_TOKENS, "generate"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        reports: dict[str, Report] = {name: run() for name, run in ways.items()}
        assert reports["packed"].rows[0].emitted == reports["chosen"].rows[0].emitted
        for name, report in reports.items() if number else ():  # the first round warms up
            seconds[name].append(report.seconds / report.tokens)
    row: dict[str, Any] = {"shape": shape, "plain": plain, "products": len(products(chosen))}
    for name, other in (("chosen", "packed"), ("chosen", "hf"), ("packed", "hf")):
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds[other], strict=True)]
        row[f"{name}_over_{other}"] = [min(ratios), median(ratios), max(ratios)]
    return row


def main(
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    machine = describe_machine(torch.float32)
    SAY.print(machine)
    rows = []
    for shape in ("reference", "smollm2-135m"):
        row = measure(shape, 5 if quick else 15)
        rows.append(row | {"threads": threads, "dtype": "float32", "batch": 1, "machine": machine})
        ratios = "   ".join(
            f"{name} {mid:.2f} [{low:.2f}, {high:.2f}]"
            for name, (low, mid, high) in ((n, v) for n, v in row.items() if "_over_" in n)
        )
        SAY.print(f"{shape}: plain {row['plain']} of {row['products']}   {ratios}", soft_wrap=True)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
