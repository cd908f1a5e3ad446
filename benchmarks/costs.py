"""Do the parts of a cost table add up to what decoding really takes?

Profiles a model, then decodes with nothing timed inside: full depth with no policy, full depth
after asking at every exit, and every token leaving at one exit. The price
that ``CostTable`` puts on each is set against the seconds per step that it took. Ways of decoding
take turns, run by run; medians with 95 % intervals.

    python benchmarks/costs.py --json costs_check.json
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from offramp.controller.costs.cost_file import load_costs
from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1, IntArray
from offramp.envs.charges.token_costs import TokenCosts
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.loop import SILENT, STAY, PartClock, ScriptedPolicy, decode_steps
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import ProfileConfig
from offramp.worker.profiling.samples import median_interval, random_policy
from offramp.worker.spec import WorkerSpec, load_engine

STEPS = 16
EXITS = (3, 6, 9)


def main(
    model: Annotated[str, typer.Option(help="Model folder, of 12 layers.")] = "models/reference",
    costs: Annotated[Path | None, typer.Option(help="A table; else profile now.")] = None,
    rows: Annotated[str, typer.Option(help="Rows to check at.")] = "1,4",
    repeats: Annotated[int, typer.Option(help="Runs of each way of decoding.")] = 20,
    limit_s: Annotated[float, typer.Option(help="Seconds of profiling.")] = 120.0,
    quick: Annotated[bool, typer.Option("--quick", help="Under 4 minutes.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
) -> None:
    sizes = tuple(map(int, rows.split(",")))
    engine = load_engine(WorkerSpec(model=model, threads=threads, slots=sizes[-1]))
    rng = np.random.default_rng(0)
    vocab = engine.stack.vocab
    table_VK = np.stack([rng.permutation(vocab)[:64] for _ in range(vocab)]).astype(np.int32)
    config = ProfileConfig(
        rows=sizes, tokens=(1,), exits=EXITS, limit_s=60.0 if quick else limit_s, half_width=0.02
    )
    table = load_costs(costs) if costs else measure_costs(engine, table_VK, config).costs
    table.require_model(engine.model_fingerprint)
    found = [
        row
        for size in sizes
        for row in check(engine, table, table_VK, size, 8 if quick else repeats)
    ]
    show(table, found)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def check(
    engine: AdaptiveEngine, costs: CostTable, table_VK: IntArray, rows: int, repeats: int
) -> list[dict[str, Any]]:
    """What each way of decoding was to take, and took, in µs per launch."""
    prices, launch_s = costs.at(rows), rows * costs.at(1).full_s
    asked_s = TokenCosts.of(costs, EXITS, rows).asked_everywhere_E1[-1] * launch_s
    expected = {"full depth": prices.full_s, "full depth, asked": float(asked_s)}
    acts = {"full depth": SILENT, "full depth, asked": STAY}
    for place, exit_layer in enumerate(EXITS):
        left = TokenCosts.of(costs, (exit_layer,), rows).asked_everywhere_E1[0]
        expected[f"exit {exit_layer}"] = float(left * launch_s)
        acts[f"exit {exit_layer}"] = place
    script = ScriptedPolicy(random_policy(CANDIDATES_V1, EXITS, table_VK))
    rng = np.random.default_rng(rows)
    prompts = rng.integers(512, size=(rows, costs.context)).tolist()
    clock = PartClock(engine.stack.device)
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(repeats):
        for name, act in acts.items():
            steps = decode_steps(engine, clock, script, prompts, [act] * STEPS)
            taken[name].append(median(step.whole_s for step in steps))
    return [row_of(name, rows, expected[name], taken[name]) for name in acts]


def row_of(name: str, rows: int, expected: float, taken: list[float]) -> dict[str, Any]:
    middle, low, high = (1e6 * value for value in median_interval(taken))
    return {
        "decoding": name,
        "rows": rows,
        "expected_us": 1e6 * expected,
        "us": middle,
        "us_low": low,
        "us_high": high,
        "ratio": 1e6 * expected / middle,
    }


def show(costs: CostTable, found: list[dict[str, Any]]) -> None:
    title = f"{costs.machine}; {costs.clock}; µs per launch"
    table = Table("decoding", "rows", "by the table", "measured", "ratio", title=title)
    for row in found:
        measured = f"{row['us']:.0f} [{row['us_low']:.0f}, {row['us_high']:.0f}]"
        expected = f"{row['expected_us']:.0f}"
        table.add_row(row["decoding"], str(row["rows"]), expected, measured, f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
