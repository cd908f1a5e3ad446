"""What do compiled and lean layers gain at full depth with few rows?

Four ways in turns on the same prompts: Hugging Face's layers with the products of this machine
(*layers*), lean layers whose products always have oneDNN's blocked layout (*lean*), the engine as
it is, compiled where that was measured to be faster (*compiled*; `worker/model/kernels/`), and
Hugging Face's ``generate`` (*hf*: KV cache, sdpa). A ratio is the median over rounds, between its
smallest and largest; `differing` counts rows whose tokens are not those of *lean*.

    python benchmarks/few_rows.py --threads 1 --json few_rows.json
    python benchmarks/few_rows.py --quick --dtypes bfloat16 --batches 1,8
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from shared.timing import Report, hugging_face, ours
from shared.workload import build, prompts_of

from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.model import prepared
from offramp.worker.model.loading import parse_dtype
from offramp.worker.profiling.profile import describe_machine

NEW_TOKENS = 32
PAIRS = (("compiled", "lean"), ("compiled", "layers"), ("compiled", "hf"), ("lean", "layers"))
SAY = Console(highlight=False)


def engines(model: Any, batch: int) -> dict[str, AdaptiveEngine]:
    """Engines over one model that differ in how its layers are prepared."""
    with patch.object(prepared, "has_lean_form", lambda _: False):
        layers = AdaptiveEngine(model, slots=batch)
    with patch.object(prepared, "rows_up_to", lambda *_: 0):
        lean = AdaptiveEngine(model, slots=batch)
    return {"layers": layers, "lean": lean, "compiled": AdaptiveEngine(model, slots=batch)}


def measure(shape: str, dtype: torch.dtype, batch: int, rounds: int) -> dict[str, Any]:
    model = build(shape, dtype)
    prompts = prompts_of(model, shape, batch)
    ways: dict[str, Callable[[], Report]] = {
        name: lambda engine=engine: ours(engine, prompts, NEW_TOKENS, NeverExit())  # type: ignore[misc]
        for name, engine in engines(model, batch).items()
    }
    ways["hf"] = lambda: hugging_face(model, prompts, NEW_TOKENS, "generate")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differing = 0
    for number in range(rounds + 1):
        reports: dict[str, Report] = {name: run() for name, run in ways.items()}
        emitted = [
            {tuple(row.request.prompt): row.emitted for row in reports[name].rows}
            for name in ("lean", "compiled")
        ]
        differing = sum(tokens != emitted[1][prompt] for prompt, tokens in emitted[0].items())
        for name, report in reports.items() if number else ():  # the first round warms up
            seconds[name].append(report.seconds / report.tokens)
    row: dict[str, Any] = {"shape": shape, "batch": batch, "differing": differing}
    row["tokens_per_s"] = {name: 1 / median(values) for name, values in seconds.items()}
    for name, other in PAIRS:
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds[other], strict=True)]
        row[f"{name}_over_{other}"] = [min(ratios), median(ratios), max(ratios)]
    return row


def main(
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    shapes: Annotated[str, typer.Option(help="Models.")] = "reference,smollm2-135m",
    dtypes: Annotated[str, typer.Option(help="Types of the weights.")] = "float32,bfloat16",
    batches: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,4,8",
    quick: Annotated[bool, typer.Option(help="Fewer rounds.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    machine = describe_machine(torch.float32)
    SAY.print(machine)
    rows = []
    cells = [(s, d, int(b)) for s in shapes.split(",") for d in dtypes.split(",")
             for b in batches.split(",")]  # fmt: skip
    for shape, dtype, batch in cells:
        row = measure(shape, parse_dtype(dtype), batch, 5 if quick else 15)
        rows.append(row | {"threads": threads, "dtype": dtype, "machine": machine})
        ratios = "   ".join(
            f"{name} {mid:.2f} [{low:.2f}, {high:.2f}]"
            for name, (low, mid, high) in ((n, v) for n, v in row.items() if "_over_" in n)
        )
        SAY.print(
            f"{shape}, {dtype}, {batch}: {row['tokens_per_s']['compiled']:.1f} tokens/s   {ratios}"
            f"   differing {row['differing']}",
            soft_wrap=True,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
