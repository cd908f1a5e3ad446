"""How cost grows: tokens/s against the context's length and against the batch.

Full depth, scripted exits (mean depth 25 %, project) and Hugging Face's ``generate``, interleaved,
on the SmolLM2-135M shape with random weights. Draws docs/growth.png.

    python benchmarks/growth.py --json growth.json --png docs/growth.png
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from shared.timing import hugging_face, ours
from shared.workload import ScriptedExit, build, exit_layer

from offramp.controller.policies.protocols import NeverExit
from offramp.worker import AdaptiveEngine, EngineConfig
from offramp.worker.profiling.profile import describe_machine

SHAPE = "smollm2-135m"
NEW = 12
EXIT_SHARE = 0.9
"""Leaving after a sixth of the layers, this makes a mean depth of 25 %."""

ENGINES = ("HF generate", "full depth", "exits 25%")


@dataclass
class Point:
    axis: str
    at: int
    engine: str
    tokens_per_s: float
    low: float
    high: float


def main(
    contexts: Annotated[str, typer.Option(help="At batch 1.")] = "128,512,1024,2048,4096",
    batches: Annotated[str, typer.Option(help="At context 128.")] = "1,2,4,8,16,32",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Interleaved; medians count.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    png: Annotated[Path | None, typer.Option(help="Draw here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    model = build(SHAPE, getattr(torch, dtype))
    points: list[Point] = []
    for context in map(int, contexts.split(",")):
        points += measure(model, "context", context, context, 1, repeats)
    for batch in map(int, batches.split(",")):
        points += measure(model, "batch", batch, 128, batch, repeats)
    machine = describe_machine(model.dtype)
    show(points, machine)
    if json_file is not None:
        report = {"machine": machine, "rows": [asdict(point) for point in points]}
        json_file.write_text(json.dumps(report, indent=1))
    if png is not None:
        draw(points, machine, png)


def measure(model: Any, axis: str, at: int, context: int, batch: int, repeats: int) -> list[Point]:
    engine = AdaptiveEngine(model, slots=batch, config=EngineConfig(prefill_tokens=2**20))
    rng = np.random.default_rng(at)
    prompts = rng.integers(1, model.config.vocab_size, size=(batch, context)).tolist()
    leaves_at = exit_layer(model.config.num_hidden_layers)
    rates: dict[str, list[float]] = {name: [] for name in ENGINES}
    for turn in range(repeats + 1):
        runs = (
            hugging_face(model, prompts, NEW, "HF generate"),
            ours(engine, prompts, NEW, NeverExit()),
            ours(engine, prompts, NEW, ScriptedExit((leaves_at,), EXIT_SHARE)),
        )
        for name, run in zip(ENGINES, runs, strict=True):
            if turn:  # the first turn only warms up
                rates[name].append(run.tokens / run.seconds)
    return [
        Point(axis, at, name, median(each), min(each), max(each)) for name, each in rates.items()
    ]


def show(points: list[Point], machine: str) -> None:
    table = Table("axis", "at", "engine", "tokens/s", "spread", title=machine)
    for p in points:
        spread = f"{p.low:.1f}-{p.high:.1f}"
        table.add_row(p.axis, str(p.at), p.engine, f"{p.tokens_per_s:.1f}", spread)
    Console().print(table)


def draw(points: list[Point], machine: str, png: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"context": "tokens of context, batch 1", "batch": "batch, 128 tokens of context"}
    for panel, (axis, label) in zip(panels, labels.items(), strict=True):
        for name in ENGINES:
            line = [p for p in points if p.axis == axis and p.engine == name]
            at = [p.at for p in line]
            panel.plot(at, [p.tokens_per_s for p in line], "o-", label=name)
            panel.fill_between(at, [p.low for p in line], [p.high for p in line], alpha=0.15)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({p.at for p in points if p.axis == axis}))
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel(label)
        panel.set_ylabel("tokens/s")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{SHAPE} shape, {machine}", fontsize=9)
    figure.tight_layout()
    figure.savefig(png, dpi=130)


if __name__ == "__main__":
    typer.run(main)
