"""What does a decision cost? Each probe and the policy, alone and inside the decode loop.

*Warm* is a call right after itself; *loop* is what the same call takes between two layers of a real
decode step, whose weights have pushed everything out of the caches. Only the latter is paid. All
parts are taken in turn, and a part's time is reported in microseconds and in layers of that model.

    python benchmarks/probes.py --json probes.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from offramp.research.probe_costs import probe_costs
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec, load_engine


def main(
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    candidates: Annotated[int, typer.Option(help="Candidate tokens per token.")] = 64,
    exits: Annotated[str, typer.Option(help="Layers to probe after.")] = "3,6,9",
    repeats: Annotated[int, typer.Option(help="Interleaved decode steps per schema.")] = 200,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    engine = load_engine(WorkerSpec(model=model, dtype=dtype, threads=threads))
    vocab = engine.stack.vocab
    rng = np.random.default_rng(0)
    table_VK = np.stack([rng.permutation(vocab)[:candidates] for _ in range(vocab)])
    layers = tuple(map(int, exits.split(",")))
    costs = probe_costs(engine, table_VK.astype(np.int32), exits=layers, repeats=repeats)
    machine = describe_machine(engine.stack.dtype)
    title = f"{machine}; K={candidates}, batch 1, exits {exits}"
    heads = ("warm", "loop", "decide", "question", "build", "per token", "share", "layers")
    table = Table("schema", *heads, title=title, caption="µs; layers: one question in the loop")
    for name, cost in costs.items():
        parts = (cost.warm_s, cost.probe_s, cost.decide_s, cost.ask_s, cost.build_s, cost.token_s)
        cells = [f"{part * 1e6:.1f}" for part in parts]
        table.add_row(name, *cells, f"{cost.share:.1%}", f"{cost.layers:.3f}")
    Console().print(table)
    if json_file is not None:
        rows = {name: asdict(cost) for name, cost in costs.items()}
        settings = {"model": model, "candidates": candidates, "exits": exits, "repeats": repeats}
        json_file.write_text(json.dumps({"machine": machine, **settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
